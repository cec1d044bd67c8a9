"""Everything that happened, as JSON lines beside the logs: `pdctl events` shows them, `pdctl why` the exits among them.

Two files, `events.jsonl` and `exits.jsonl`, written by the supervisor alone. A full disk delays lines of them; it never
ends the service.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

EVENTS, EXITS = "events.jsonl", "exits.jsonl"
_MOST = 16 * 2**20
# Entries kept while the disk takes none, of each file; the oldest go first.
_MOST_UNWRITTEN = 1000
# Exits kept for `why`.
_MOST_EXITS = 200


def now_text() -> str:
    """This moment, for people and files."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Journal:
    """`say(process, message)` is told of every event too. What a full disk refuses is kept, and written later."""

    def __init__(self, folder: Path, say: Callable[[str, str], None]) -> None:
        self._folder = folder
        self._say = say
        self._complained = False
        self._unwritten: dict[str, deque[bytes]] = {}
        self._exits: deque[dict[str, object]] = deque(maxlen=_MOST_EXITS)

    def say(self, name: str, message: str, event: str = "note", **detail: object) -> None:
        """Something happened to process `name`, or to the service as a whole ("pdctl")."""
        self._say(name, message)
        self._append(EVENTS, {"at": now_text(), "process": name, "event": event, "message": message, **detail})

    def exit(self, report: dict[str, object]) -> None:
        """A process ended: the whole report."""
        self._exits.append(report)
        self._append(EXITS, report)

    def exits(self) -> list[dict[str, object]]:
        """The last exits of this run, oldest first, whether they could be written or not."""
        return list(self._exits)

    def _append(self, file: str, entry: dict[str, object]) -> None:
        waiting = self._unwritten.setdefault(file, deque(maxlen=_MOST_UNWRITTEN))
        waiting.append(json.dumps(entry).encode() + b"\n")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            while waiting:
                _append_line(self._folder / file, waiting[0])
                waiting.popleft()
            self._complained = False
        except OSError as failure:
            if not self._complained:
                self._complained = True
                self._say("pdctl", f"{self._folder / file} cannot be written: {failure.strerror}")


def _append_line(path: Path, line: bytes) -> None:
    """The whole line or nothing. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        # One write, so that a reader never sees half a line.
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)
    if size + len(line) > _MOST:
        path.replace(path.with_name(f"{path.name}.old"))


def read_entries(folder: Path, file: str) -> list[dict[str, object]]:
    """All entries of a journal file, oldest first; half-written lines are left out."""
    found: list[dict[str, object]] = []
    for name in (f"{file}.old", file):
        with contextlib.suppress(FileNotFoundError):
            found += parsed((folder / name).read_bytes().splitlines())
    return found


def parsed(lines: Iterable[bytes]) -> list[dict[str, object]]:
    """Entries; lines that a full disk took half of are left out."""
    found: list[dict[str, object]] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found
