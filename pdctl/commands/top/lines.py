"""Lines of text whose parts have a meaning (a level); `draw` gives each level its colour. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

Level = Literal["plain", "dim", "title", "good", "busy", "bad", "chosen", "asked"]

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_RISING = " ▁▂▃▄▅▆▇█"
_GROWING = " ▏▎▍▌▋▊▉█"
# What a terminal without UTF-8 shows instead.
_ASCII = str.maketrans(dict(zip(
    "▁▂▃▄▅▆▇█▏▎▍▌▋▊▉●○✗→←▲▼▶│├└─…", "__..::|#.......*ox><^v>|+`-.", strict=True,
)))  # fmt: skip


class Span(NamedTuple):
    """A part of a line."""

    text: str
    level: Level = "plain"


Line = list[Span]


def width_of(line: Line) -> int:
    """Its characters."""
    return sum(len(span.text) for span in line)


def clean(text: str) -> str:
    """Text of others, such as a log line, without anything that a terminal would obey."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\t", "    ")))


def in_ascii(text: str) -> str:
    """For a terminal that shows ASCII only."""
    return text.translate(_ASCII).encode("ascii", "replace").decode()


def bar(part: float, width: int) -> str:
    """A horizontal bar of `width` characters, filled to `part` (0 to 1)."""
    eighths = round(min(1.0, max(0.0, part)) * width * 8)
    # What is not empty is seen as that.
    eighths = max(eighths, 1) if part > 0 else 0
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_GROWING[rest] if rest else "")).ljust(width)


def trend(values: Sequence[float | None], width: int) -> str:
    """The last `width` values as one line of rising blocks, from 0 to their maximum; a gap where a value is unknown."""
    return chart(values, width, 1)[0]


def chart(values: Sequence[float | None], width: int, height: int) -> list[str]:
    """The last `width` values as `height` lines of blocks, the top line first. The scale goes from 0 to the maximum."""
    shown = [None] * max(0, width - len(values)) + list(values[max(0, len(values) - width) :])
    most = max((value for value in shown if value is not None), default=0.0)
    tops = [None if value is None else _top(value, most, height * 8) for value in shown]
    return [
        "".join(" " if top is None else _RISING[min(8, max(0, top - 8 * floor))] for top in tops)
        for floor in reversed(range(height))
    ]


def _top(value: float, most: float, eighths: int) -> int:
    """Height of a value in eighths of a line: at least one, so that a line of zeros is seen."""
    return max(1, round(value / most * eighths)) if most > 0 else 1


def milliseconds(seconds: float | None) -> str:
    """A latency: 9.4ms, 120ms, 1.20s; "-" if it is unknown."""
    if seconds is None:
        return "-"
    if seconds < 0.01:
        return f"{seconds * 1000:.1f}ms"
    return f"{seconds * 1000:.0f}ms" if seconds < 1 else f"{seconds:.2f}s"


def rate(value: float | None) -> str:
    """A number per second with two digits at least; "-" if it is unknown."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.1f}"
