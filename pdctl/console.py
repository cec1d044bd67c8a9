"""Output: data on stdout, messages on stderr, colours only on terminals."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import TextIO

from pdctl.errors import PdctlError

_COLOURS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36, "dim": 2, "bold": 1}
_NAME_COLOURS = ("cyan", "magenta", "yellow", "green", "blue")


def wants_colour(stream: TextIO) -> bool:
    """Colour on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO) -> str:
    """`text` in `colour`, if `stream` shows colours."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if wants_colour(stream) else text


def name_colour(index: int) -> str:
    """The colour of the index-th process name; repeats after five."""
    return _NAME_COLOURS[index % len(_NAME_COLOURS)]


def prepare() -> None:
    """Make both streams usable in any environment. A closed stream discards everything; a character that the encoding
    lacks is written as an escape."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open until the process exits
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def out(text: str = "", end: str = "\n") -> None:
    """Write data to stdout. Raises PdctlError if it cannot be written, BrokenPipeError if the reader has exited."""
    out_bytes((text + end).encode(sys.stdout.encoding or "utf-8", "backslashreplace"))


def out_bytes(data: bytes) -> None:
    """Write bytes to stdout; errors as in `out`."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as failure:
        raise cannot_print(failure) from None


def cannot_print(failure: OSError) -> PdctlError:
    """The error for a stdout that cannot be written; its buffered data is dropped."""
    drop_stdout()
    return PdctlError(f"stdout cannot be written: {failure.strerror}", "free space at its target, or redirect it")


def drop_stdout() -> None:
    """Redirect stdout to /dev/null, so that flushing its buffer at exit cannot fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def note(text: str, end: str = "\n") -> None:
    """Write a message to stderr. Errors are ignored: there is no other place to report them."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text + end)
        sys.stderr.flush()


def error(message: str, hint: str | None = None) -> None:
    """Write an error and its hint to stderr."""
    note(f"{paint('error:', 'red', sys.stderr)} {message}")
    if hint:
        note(f"{paint('hint:', 'cyan', sys.stderr)} {hint}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], colours: dict[str, str] | None = None) -> str:
    """A plain aligned table. A cell that equals a key of `colours` is coloured."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [paint("  ".join(h.ljust(w) for h, w in zip(header, widths, strict=True)).rstrip(), "bold", sys.stdout)]
    for row in rows:
        cells = []
        for cell, width in zip(row, widths, strict=True):
            colour = (colours or {}).get(cell)
            padded = cell.ljust(width)
            cells.append(paint(padded, colour, sys.stdout) if colour else padded)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A short form of a duration: 340ms, 12s, 4m10s, 3h02m."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
    return f"{int(seconds) // 3600}h{int(seconds) % 3600 // 60:02d}m"
