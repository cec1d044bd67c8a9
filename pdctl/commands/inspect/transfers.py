"""Measured transfers as a table, with why they are not what was wanted."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pdctl import console

if TYPE_CHECKING:
    from pdctl.doctor.transfer import Result


def table(found: list[Result]) -> str:
    """One line for each."""
    header = ["TRANSPORT", "PAIR", "OVER", "BYTES", "GB/S", "OF A COPY", "OF THE LINK", "64K BLOCKS", "GB/S",
    "OF A COPY",
              "64 BYTES"]  # fmt: skip
    return console.table(header, [_row(entry) for entry in found], {"RIGHT": "green", "WRONG": "red"})


def _row(entry: Result) -> list[str]:
    names = [entry["transport"], entry["pair"] or "-"]
    if "error" in entry:
        return [*names, "-", "not available", *["-"] * 7]
    return [
        *names,
        entry["protocol"],
        "RIGHT" if entry["bytes_right"] else "WRONG",
        f"{entry['gbps']:.2f}",
        f"{entry['of_copy']:.0%}",
        "-" if entry["of_link"] is None else f"{entry['of_link']:.0%}",
        str(entry["blocks"]),
        f"{entry['blocks_gbps']:.2f}",
        f"{entry['blocks_of_copy']:.0%}",
        f"{entry['latency_us']:.0f} us",
    ]


def advise(found: list[Result]) -> None:
    """Print errors and fallbacks."""
    for entry in found:
        if "error" in entry:
            console.note(f"{entry['transport']}: {entry['error']}")
            for line in entry.get("said", "").splitlines():
                console.note(f"    {line}")
        elif entry["fallback"]:
            mark = console.paint("FALLBACK", "red", sys.stderr)
            console.note(f"{entry['transport']}: {mark} to {entry['protocol']}: {entry['fallback']}")
