"""Read small kernel files. Missing, denied and invalid values are distinguished."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_MOST_BYTES = 4096
# A hanging driver blocks its reader in the kernel: the read is given up after this, seconds.
_DEADLINE_S = 2.0
# Limit of hanging reads: each blocks a thread that may never return.
_MOST_HANGING = 8


class Answer(StrEnum):
    """The outcome of a read."""

    OK = "ok"
    MISSING = "missing"
    DENIED = "denied"
    INVALID = "invalid"  # the kernel has no value: EINVAL and similar errors
    GONE = "gone"  # the device was removed during the read
    HANGS = "hangs"


@dataclass(frozen=True, slots=True)
class Value:
    """The result of a read. `text`: the content without the last newline; "" unless `answer` is ok. `errno`: the
    error."""

    path: str
    answer: Answer
    text: str = ""
    errno: int = 0

    @property
    def is_ok(self) -> bool:
        """Whether the read succeeded."""
        return self.answer is Answer.OK

    def integer(self, base: int = 10) -> int | None:
        """The leading number; None if there is none."""
        word = self.text.split(":", 1)[0].strip() if base == 10 else self.text.strip()
        with contextlib.suppress(ValueError):
            return int(word, base)
        return None


class Reader:
    """Reads files, each within a deadline. A file that hung once is not read again."""

    def __init__(self, deadline_s: float = _DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._hanging: set[str] = set()

    def read(self, path: Path) -> Value:
        """Read a file. Never raises and never hangs."""
        name = str(path)
        if name in self._hanging or len(self._hanging) >= _MOST_HANGING:
            return Value(name, Answer.HANGS)
        try:
            # A file on disk can be read at once. Real sysfs calls a driver, which may hang, so it is read in a thread.
            return _read_now(name) if _is_plain(name) else self._read_aside(name)
        except OSError as failure:
            return _failed(name, failure)

    def _read_aside(self, name: str) -> Value:
        found: list[Value] = []
        thread = threading.Thread(target=lambda: found.append(_caught(name)), daemon=True)
        thread.start()
        thread.join(self._deadline_s)
        if not found:
            self._hanging.add(name)
            return Value(name, Answer.HANGS)
        return found[0]


def _is_plain(name: str) -> bool:
    """Whether reading cannot block: a regular file with disk blocks, which sysfs files do not have."""
    status = os.stat(name)  # noqa: PTH116 - thousands of these
    return status.st_blocks > 0 and (status.st_mode & 0o170000) == 0o100000


def _caught(name: str) -> Value:
    try:
        return _read_now(name)
    except OSError as failure:
        return _failed(name, failure)


def _read_now(name: str) -> Value:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, _MOST_BYTES)
    finally:
        os.close(descriptor)
    return Value(name, Answer.OK, data.decode("ascii", "replace").removesuffix("\n"))


def _failed(name: str, failure: OSError) -> Value:
    code = failure.errno or 0
    answer = {
        errno.ENOENT: Answer.MISSING,
        errno.ENOTDIR: Answer.MISSING,
        errno.ELOOP: Answer.MISSING,
        errno.EISDIR: Answer.MISSING,
        errno.EACCES: Answer.DENIED,
        errno.EPERM: Answer.DENIED,
        errno.ENODEV: Answer.GONE,
        errno.ENXIO: Answer.GONE,
    }.get(code, Answer.INVALID)
    return Value(name, answer, errno=code)
