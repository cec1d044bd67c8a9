"""What a command and the process that talks to a launcher say to each other, as JSON on stdin and stdout."""

from __future__ import annotations

import msgspec

from pdctl.launchers.launcher import Standing, Wanted


class Request(msgspec.Struct, frozen=True):
    """What to do. `verb`: start (with `wanted`) or give_back (with `service`); `address`: of the kind's own cluster."""

    verb: str
    kind: str
    address: str
    wanted: Wanted | None = None
    service: str = ""
    now: bool = False


class Told(msgspec.Struct, frozen=True):
    """How it went. `error`: why not, "" if it did; `ended`: the nodes where an agent was ended."""

    agents: list[Standing] = []
    notes: list[str] = []
    ended: list[str] = []
    error: str = ""
    hint: str = ""
