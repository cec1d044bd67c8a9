"""Everything that happened, as JSON lines beside the logs: `pdctl events` shows them, `pdctl why` the exits among them.

Two files, `events.jsonl` and `exits.jsonl`, written by the supervisor alone. A full disk loses lines of them; it never
ends the service.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

EVENTS, EXITS = "events.jsonl", "exits.jsonl"
_MOST = 16 * 2**20


def now_text() -> str:
    """This moment, for people and files."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Journal:
    """`say(process, message)` is told of every event too."""

    def __init__(self, folder: Path, say: Callable[[str, str], None]) -> None:
        self._folder = folder
        self._say = say
        self._complained = False

    def say(self, name: str, message: str, event: str = "note", **detail: object) -> None:
        """Something happened to process `name`, or to the service as a whole ("pdctl")."""
        self._say(name, message)
        self._append(EVENTS, {"at": now_text(), "process": name, "event": event, "message": message, **detail})

    def exit(self, report: dict[str, object]) -> None:
        """A process ended: the whole report."""
        self._append(EXITS, report)

    def _append(self, file: str, entry: dict[str, object]) -> None:
        path = self._folder / file
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                # One write, so that a reader never sees half a line; a full disk may take half of one.
                os.write(descriptor, json.dumps(entry).encode() + b"\n")
                large = os.fstat(descriptor).st_size > _MOST
            finally:
                os.close(descriptor)
            if large:
                path.replace(path.with_name(f"{file}.old"))
            self._complained = False
        except OSError as failure:
            if not self._complained:
                self._complained = True
                self._say("pdctl", f"{path} cannot be written: {failure.strerror}")


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
