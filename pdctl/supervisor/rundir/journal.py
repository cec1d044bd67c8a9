"""All events, as JSON lines beside the logs: `pdctl events` shows them, and `pdctl why` shows the exits among them.

Only the supervisor writes the two files, `events.jsonl` and `exits.jsonl`. A full disk delays their lines; it never
stops the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from pdctl.control_api import ExitReport

EVENTS, EXITS = "events.jsonl", "exits.jsonl"
_MOST = 16 * 2**20
# Entries kept in memory per file while the disk is full; the oldest are dropped first.
_MOST_UNWRITTEN = 1000
# Exits kept for `why`.
_MOST_EXITS = 200


def now_text() -> str:
    """The current time as text, for users and files."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Journal:
    """Also reports every event to `say(process, message)`. Entries that a full disk rejects are written later."""

    def __init__(self, folder: Path, say: Callable[[str, str], None]) -> None:
        self._folder = folder
        self._say = say
        self._complained = False
        self._unwritten: dict[str, deque[bytes]] = {}
        self._exits: deque[ExitReport] = deque(maxlen=_MOST_EXITS)
        self._followers: set[asyncio.Event] = set()

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self._folder

    def say(self, name: str, message: str, event: str = "note", **detail: object) -> None:
        """Record an event of process `name`, or of the service itself ("pdctl")."""
        self._say(name, message)
        self._append(EVENTS, {"at": now_text(), "process": name, "event": event, "message": message, **detail})
        for follower in self._followers:
            follower.set()

    @contextlib.contextmanager
    def followed(self) -> Iterator[asyncio.Event]:
        """Set after each event, as long as this lasts."""
        follower = asyncio.Event()
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    def exit(self, report: ExitReport) -> None:
        """Record the full report of a process's exit."""
        self._exits.append(report)
        self._append(EXITS, msgspec.to_builtins(report))

    def exits(self) -> tuple[ExitReport, ...]:
        """The last exits of this run, oldest first, including any not yet written."""
        return tuple(self._exits)

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
    """Append the whole line or nothing. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        # One write, so that a reader never reads half a line.
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)
    if size + len(line) > _MOST:
        path.replace(path.with_name(f"{path.name}.old"))


def read_entries(folder: Path, file: str) -> list[dict[str, object]]:
    """All entries of a journal file, oldest first; incomplete lines are omitted."""
    found: list[dict[str, object]] = []
    for name in (f"{file}.old", file):
        with contextlib.suppress(FileNotFoundError):
            found += parsed((folder / name).read_bytes().splitlines())
    return found


def read_exits(folder: Path) -> list[ExitReport]:
    """All exits that were written up, oldest first; entries of another pdctl that lack something are left out."""
    found: list[ExitReport] = []
    for entry in read_entries(folder, EXITS):
        with contextlib.suppress(msgspec.ValidationError):
            found.append(msgspec.convert(entry, type=ExitReport))
    return found


def parsed(lines: Iterable[bytes]) -> list[dict[str, object]]:
    """Parse entries; lines cut short by a full disk are omitted."""
    found: list[dict[str, object]] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found
