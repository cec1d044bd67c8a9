"""Show the log files of several processes as one stream of lines with coloured names."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

from pdctl import console
from pdctl.supervisor.process.logs import KEPT, archive_of, first_byte

_POLL_S = 0.1
_CHUNK = 1 << 16
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,6})?(?:Z|[+-]\d\d:?\d\d)?")


class Labelled:
    """Shows lines behind the names of their processes, each in a colour of its own."""

    def __init__(self, names: Iterable[str]) -> None:
        self._colours: dict[str, str] = {}
        for name in names:
            self.add(name)
        self._width = max(map(len, (*self._colours, "pdctl")))

    def add(self, name: str) -> None:
        """One more process."""
        self._colours[name] = console.name_colour(len(self._colours))

    def show(self, name: str, line: str) -> None:
        """Show a line of a process; of the supervisor, for another name."""
        # The reader has exited or the disk is full: the service goes on.
        with contextlib.suppress(OSError):
            colour = self._colours.get(name, "dim")
            console.out(f"{console.paint(name.ljust(self._width), colour, sys.stdout)} | {line}")


class Follower:
    """Shows lines appended to the files from now on. Handles rotation."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._shown = Labelled(files)
        self._places = {name: _place(path) for name, path in files.items()}
        self._partial: dict[str, str] = dict.fromkeys(files, "")

    def watch(self, name: str, path: Path) -> None:
        """Show one more file, from its start."""
        if name not in self._files:
            self._files[name], self._places[name], self._partial[name] = path, (0, 0), ""
            self._shown.add(name)

    def show(self, name: str, line: str) -> None:
        """Show a log line of a process."""
        self._shown.show(name, line)

    async def follow_forever(self) -> None:
        """Show new lines until cancelled."""
        while True:
            self.show_new()
            await asyncio.sleep(_POLL_S)

    def say(self, name: str, message: str) -> None:
        """Show a message of the supervisor about a process."""
        stamp = datetime.now().astimezone().strftime("%H:%M:%S")
        self._shown.show("pdctl", f"{stamp} {message}" if name == "pdctl" else f"{stamp} {name}: {message}")

    def show_new(self) -> None:
        """Show the lines appended since the last call."""
        for name, path in self._files.items():
            for line in self._new_lines(name, path):
                self._shown.show(name, line)

    def _rest_of(self, name: str, path: Path, inode: int, offset: int) -> None:
        """Show the last lines of a log that has been rotated since the last call."""
        for number in range(1, KEPT + 1):
            before = path.with_name(f"{path.name}.{number}")
            if _place(before)[0] == inode:
                with before.open("rb") as file:
                    file.seek(offset)
                    text = self._partial[name] + file.read().decode(errors="replace")
                self._partial[name] = ""
                for line in text.splitlines():
                    self._shown.show(name, line)
                return

    def _new_lines(self, name: str, path: Path) -> list[str]:
        inode, offset = self._places[name]
        here, size = _place(path)
        if here != inode and inode:
            self._rest_of(name, path, inode, offset)
        if here != inode or size < offset:
            offset = 0
        if size <= offset:
            self._places[name] = (here, offset)
            return []
        with path.open("rb") as file:
            # The cut-off beginning of a log is a hole: skip it.
            offset = max(offset, min(first_byte(file.fileno()), size))
            file.seek(offset)
            data = file.read(_CHUNK if size - offset > _CHUNK else size - offset)
        self._places[name] = (here, offset + len(data))
        *lines, self._partial[name] = (self._partial[name] + data.decode(errors="replace")).split("\n")
        return lines


def merged(files: dict[str, Path], follower: Follower, after: float, previous: bool) -> None:
    """Show all lines in order of time."""
    by_time({name: _lines(path, previous) for name, path in files.items()}, follower.show, after)


def by_time(logs: Mapping[str, Iterable[str]], show: Callable[[str, str], None], after: float) -> None:
    """Show lines in order of time, from a time on. A line without a timestamp follows the line before it."""
    entries = []
    for index, (name, lines) in enumerate(logs.items()):
        at = 0.0
        for number, line in enumerate(lines):
            at = _time_of(line) or at
            if at >= after:
                entries.append((at, index, number, name, line))
    for _, _, _, name, line in sorted(entries, key=lambda entry: entry[:3]):
        show(name, line)


def _lines(path: Path, previous: bool) -> Iterator[str]:
    for part in _parts(path, previous):
        yield from _text(part).splitlines()


def _parts(path: Path, previous: bool) -> list[Path]:
    """A log's files, oldest first: earlier starts of the process, the part cut from this log, this log."""
    earlier = [path.with_name(f"{path.name}.{number}") for number in range(KEPT, 0, -1)] if previous else []
    return [part for part in (*earlier, archive_of(path), path) if part.exists()]


def _text(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(first_byte(file.fileno()))
        return file.read().decode(errors="replace")


def _time_of(line: str) -> float:
    """The timestamp at the start of a line, in seconds since 1970; 0 if there is none."""
    found = _TIME.match(line)
    if found is None:
        return 0.0
    try:
        return datetime.fromisoformat(found[0].replace(",", ".").replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


def _place(path: Path) -> tuple[int, int]:
    """Inode and size of a file; zeros if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_ino, found.st_size)
