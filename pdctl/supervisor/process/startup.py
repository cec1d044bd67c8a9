"""What a process's log says about its start: the current phase, and why it failed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pdctl.adapters import KnownFailure
from pdctl.supervisor.process.logs import last_error, tail

# The end of a log that is searched for a known failure.
_LAST_LINES, _LAST_BYTES = 2000, 512 * 1024
_LONGEST_REASON = 500
# Bytes read at once while a process starts.
_CHUNK = 1 << 20


class LastWords(NamedTuple):
    """Why a process ended, in its own words or those of its kind. `incurable`: a restart would fail again."""

    text: str = ""
    hint: str = ""
    incurable: bool = False


NO_WORDS = LastWords()


def last_words(log: Path, failures: Sequence[KnownFailure]) -> LastWords:
    """The first known failure of which the log has a line, else the last line that begins with "error: "."""
    if not failures:
        # This is on the way to telling the peers of a dead process: read no more than needed.
        return LastWords(last_error(log))
    lines = tail(log, _LAST_LINES, _LAST_BYTES)
    for failure in failures:
        pattern = re.compile(failure.pattern)
        for line in lines:
            if (found := pattern.search(line)) is not None:
                groups = [group or "" for group in found.groups()]
                return LastWords(
                    failure.message.format(*groups)[:_LONGEST_REASON], failure.hint.format(*groups), failure.incurable
                )
    return LastWords(last_error(log))


class StartupLog:
    """Follows the log of a starting process. `phases`: (regular expression, phase that begins with such a line)."""

    def __init__(self, log: Path, phases: Sequence[tuple[str, str]]) -> None:
        self._log = log
        self._phases = [(re.compile(pattern.encode()), phase) for pattern, phase in phases]
        self._at = 0

    def next_phase(self) -> str:
        """The last phase that began since the previous call, or ""."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._at)
                data = file.read(_CHUNK)
        except OSError:
            return ""
        # A chunk without the end of a line says nothing, and must not be read again and again.
        whole = data.rfind(b"\n") + 1 or (len(data) if len(data) == _CHUNK else 0)
        self._at += whole
        found = ""
        for line in data[:whole].splitlines():
            found = next((phase for pattern, phase in self._phases if pattern.search(line)), found)
        return found
