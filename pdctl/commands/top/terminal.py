"""The terminal: the whole screen, single keys, and both given back as they were. Paints lines with rich."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NamedTuple

from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live
from rich.text import Text

from pdctl.commands.top.keys import KeyReader
from pdctl.commands.top.lines import Level, Line, in_ascii

_STYLES: dict[Level, str] = {
    "plain": "", "dim": "bright_black", "title": "bold", "good": "green", "busy": "yellow", "bad": "bold red",
    "chosen": "bold cyan", "asked": "bold reverse yellow",
}  # fmt: skip
_READ = 4096
# Without another byte for this long, an escape is the key of that name, seconds.
_ESCAPE_S = 0.05


class Size(NamedTuple):
    """Characters."""

    width: int
    height: int


# Of a terminal that does not know its own.
_USUAL = Size(80, 24)


class Screen:
    """The screen of a terminal, taken over until `screen()` ends."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console, self._live = console, live
        self._is_ascii = "utf" not in console.encoding.lower()
        self._keys = KeyReader()
        self._ended = False

    @property
    def size(self) -> Size:
        """As it is now. Asked of the terminal: rich believes COLUMNS and LINES, which do not change with it."""
        with contextlib.suppress(OSError):
            width, height = os.get_terminal_size(sys.stdout.fileno())
            if width and height:
                return Size(width, height)
        return _USUAL

    def show(self, lines: Sequence[Line]) -> None:
        """Paint these lines over everything."""
        size = self.size
        self._console.size = ConsoleDimensions(*size)
        self._live.update(Group(*(painted(line, size.width, self._is_ascii) for line in lines)), refresh=True)

    def clear(self) -> None:
        """Erase what another program has written."""
        self._console.clear()

    def keys(self, wait_s: float) -> list[str]:
        """The keys pressed within that time, at once when there are any. When the terminal is gone: ctrl-c."""
        if not self._is_readable(wait_s):
            return self._keys.quiet()
        try:
            data = os.read(sys.stdin.fileno(), _READ)
        except OSError:
            data = b""
        if not data:
            return ["ctrl-c"]
        found = self._keys.feed(data)
        return found or ([] if self._is_readable(_ESCAPE_S) else self._keys.quiet())

    @staticmethod
    def _is_readable(wait_s: float) -> bool:
        return bool(select.select([sys.stdin], [], [], wait_s)[0])


def painted(line: Line, width: int, is_ascii: bool) -> Text:
    """A line with its colours, cut to the width of the screen."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for span in line:
        text.append(in_ascii(span.text) if is_ascii else span.text, _STYLES[span.level])
    text.truncate(width, overflow="ellipsis" if not is_ascii else "crop")
    return text


@contextlib.contextmanager
def screen() -> Iterator[Screen]:
    """Take the screen over. However this ends, by a signal too, the terminal is as it was before."""
    console = Console(highlight=False, markup=False, emoji=False)
    live = Live(
        console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
        vertical_overflow="crop",
    )  # fmt: skip
    with _ended_by_signals(), _single_keys(), live:
        yield Screen(console, live)


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """Every key at once, without an echo, and ctrl-c and ctrl-z as keys."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    changed = termios.tcgetattr(fd)
    changed[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
    changed[6][termios.VMIN], changed[6][termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        # The terminal may be gone.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSAFLUSH, before)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """TERM and HUP end the process by way of all `finally`s."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def suspend() -> None:
    """Stop this job, as ctrl-z does elsewhere. Returns when the shell continues it. Not while the screen is taken."""
    os.kill(0, signal.SIGTSTP)
