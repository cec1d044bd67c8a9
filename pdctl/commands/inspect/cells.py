"""How a process of a service is described in a cell of a table, for `pdctl status` and `pdctl top`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from pdctl import console

if TYPE_CHECKING:
    from pdctl.control_api import MeasuredProcess

# Colours of states.
COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "draining": "yellow",
    "drained": "yellow",
    "backoff": "yellow",
    "stopping": "yellow",
    "clearing": "yellow",
    "failed": "red",
    "answers": "green",
    "silent": "red",
    "unknown": "yellow",
}


def role_of(process: MeasuredProcess) -> str:
    """The role; after a change, that it was asked for, and what is left of the one before."""
    if process.leaving_role:
        what = "prefills" if process.leaving_role == "prefill" else "answers"
        left = "last" if process.leaving_work is None else str(process.leaving_work)
        return f"{process.role} (asked), hybrid until {left} {what} are done"
    return f"{process.role} (asked)" if process.planned_role else process.role


def inline_part(process: MeasuredProcess) -> str:
    """The part of a decode engine's prompts that it computed itself."""
    own, received = process.prompts_own or 0, process.prompts_received or 0
    return f"{100 * own / (own + received):.0f}%" if process.role == "decode" and own + received else "-"


def last_exit_of(process: MeasuredProcess, now: float | None = None) -> str:
    """Why it does not run, else how it last ended. `now`: seconds since 1970, None for the clock."""
    last, reason = process.last_exit, process.reason
    if reason and process.state not in ("ready", "starting"):
        return reason
    return f"{last.reason} {since(last.at, now)} ago" if last else reason or "-"


def ranges(numbers: Sequence[int]) -> str:
    """0-3,8 for [0, 1, 2, 3, 8]."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}-{b}" if b > a + 1 else f"{a},{b}" if b > a else f"{a}" for a, b in spans) or "-"


def number(value: float | None, form: str = "%d") -> str:
    """The number; "-" if it is unknown."""
    return "-" if value is None else form % value


def size(value: int | None) -> str:
    """Bytes; "-" for none."""
    if not value:
        return "-"
    return f"{value / 2**20:.0f}M" if value < 10 * 2**30 else f"{value / 2**30:.1f}G"


def since(at: str | None, now: float | None = None) -> str:
    """How long ago a time in ISO 8601 was; "-" for none. `now`: seconds since 1970, None for the clock."""
    if not at:
        return "-"
    now = time.time() if now is None else now
    return console.duration(max(0.0, now - datetime.fromisoformat(at).timestamp()))
