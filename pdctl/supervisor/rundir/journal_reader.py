"""Reads a service's events from a place on, while they are written.

A place (cursor) is a file and an offset in it. A file is known by its first line, which tells when it was written: its
name changes when it is full, and an inode number is used again.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pdctl.supervisor.rundir.journal import EVENTS, parsed

_CURSOR = re.compile(r"([0-9a-f]{12})\.([0-9]{1,12})")
# What is read at once, bytes, and the rest of its last line.
_CHUNK = 1 << 16


class BadCursor(ValueError):
    """A text that is no cursor."""


class Entry(NamedTuple):
    """One event as it stands in the journal, and the cursor behind it."""

    cursor: str
    line: bytes


class JournalReader:
    """What follows a cursor, or everything that is kept for "".

    A cursor whose file is no longer kept, or was never there, begins with the oldest event that is. Raises BadCursor.
    """

    def __init__(self, folder: Path, cursor: str) -> None:
        found = _CURSOR.fullmatch(cursor)
        if cursor and found is None:
            raise BadCursor(f"{cursor!r} is no cursor: take one from an event's id")
        self._paths = (folder / EVENTS, folder / f"{EVENTS}.old")
        self._file, self._place = (found[1], int(found[2])) if found is not None else ("", 0)

    @classmethod
    def near_end(cls, folder: Path, size: int = _CHUNK) -> JournalReader:
        """A reader of the last `size` bytes of the newer file, in whole lines, and of what follows."""
        reader = cls(folder, "")
        with contextlib.suppress(FileNotFoundError), (folder / EVENTS).open("rb") as file:
            reader._file = _name(file)
            reader._place = _line_after(file, size)
        return reader

    def read(self) -> list[Entry]:
        """Some of the entries that come next; none at the journal's end."""
        with contextlib.ExitStack() as stack:
            # The newer one first: when its name changes meanwhile, it is read by both names instead of by none.
            opened = [_opened(path, stack) for path in self._paths]
            files = [(name, file) for file in reversed(opened) if file is not None and (name := _name(file))]
            for number, (name, file) in enumerate(files):
                if name == self._file and _begins_a_line(file, self._place):
                    files = files[number:]
                    break
            else:
                self._file, self._place = "", 0
            for name, file in files:
                if name != self._file:
                    self._file, self._place = name, 0
                if entries := self._next(file):
                    return entries
        return []

    def _next(self, file: BinaryIO) -> list[Entry]:
        """Whole lines from our place on; those that a full disk took half of are left out."""
        entries: list[Entry] = []
        file.seek(self._place)
        while not entries and (data := file.read(_CHUNK) + file.readline()):
            for line in data.split(b"\n")[:-1]:
                self._place += len(line) + 1
                if parsed([line]):
                    entries.append(Entry(f"{self._file}.{self._place}", line))
        return entries


def _opened(path: Path, stack: contextlib.ExitStack) -> BinaryIO | None:
    with contextlib.suppress(FileNotFoundError):
        return stack.enter_context(path.open("rb"))
    return None


def _name(file: BinaryIO) -> str:
    """Which file it is, whatever it is called by now; "" before its first line is whole."""
    first = file.readline()
    return hashlib.blake2b(first, digest_size=6).hexdigest() if first.endswith(b"\n") else ""


def _line_after(file: BinaryIO, size: int) -> int:
    """Where the first line begins that is in the last `size` bytes as a whole."""
    end = file.seek(0, 2)
    if end <= size:
        return 0
    file.seek(end - size - 1)
    file.readline()
    return file.tell()


def _begins_a_line(file: BinaryIO, place: int) -> bool:
    if place == 0:
        return True
    file.seek(place - 1)
    return file.read(1) == b"\n"
