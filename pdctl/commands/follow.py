"""Log files of several processes as one stream of lines with coloured names."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from datetime import datetime
from pathlib import Path

from pdctl import console

_POLL_S = 0.1
_CHUNK = 1 << 16


class Follower:
    """Shows what is appended to the files from now on; survives rotation."""

    def __init__(self, files: dict[str, Path], from_start: bool = False) -> None:
        self._files = files
        self._width = max((len(name) for name in (*files, "pdctl")), default=5)
        self._colours = {name: console.name_colour(index) for index, name in enumerate(files)}
        self._places = {name: (0, 0) if from_start else _place(path) for name, path in files.items()}
        self._partial: dict[str, str] = dict.fromkeys(files, "")

    async def follow_forever(self) -> None:
        """Show new lines until cancelled."""
        while True:
            self.show_new()
            await asyncio.sleep(_POLL_S)

    def say(self, name: str, message: str) -> None:
        """A line of the supervisor's about a process."""
        stamp = datetime.now().astimezone().strftime("%H:%M:%S")
        self._line("pdctl", f"{stamp} {message}" if name == "pdctl" else f"{stamp} {name}: {message}", "dim")

    def show_new(self) -> None:
        """Show what has been appended since."""
        for name, path in self._files.items():
            for line in self._new_lines(name, path):
                self._line(name, line, self._colours[name])

    def _line(self, name: str, line: str, colour: str) -> None:
        # Whoever read us has left, or the disk is full: the service goes on.
        with contextlib.suppress(OSError):
            console.out(f"{console.paint(name.ljust(self._width), colour, sys.stdout)} | {line}")

    def _new_lines(self, name: str, path: Path) -> list[str]:
        inode, offset = self._places[name]
        here, size = _place(path)
        if here != inode or size < offset:
            offset = 0
        if size <= offset:
            self._places[name] = (here, offset)
            return []
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(_CHUNK if size - offset > _CHUNK else size - offset)
        self._places[name] = (here, offset + len(data))
        *lines, self._partial[name] = (self._partial[name] + data.decode(errors="replace")).split("\n")
        return lines


def _place(path: Path) -> tuple[int, int]:
    """Inode and size; zeros for a file that is not there."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_ino, found.st_size)
