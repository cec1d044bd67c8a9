"""Reading small kernel files: what is there, what is not, and what the kernel would not say are different answers."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_MOST_BYTES = 4096
# A driver that hangs holds its reader in the kernel: it is given up after this, seconds.
_DEADLINE_S = 2.0
# Readers that hang, at most: each is a thread that may never come back.
_MOST_HANGING = 8


class Answer(StrEnum):
    """How a read went."""

    OK = "ok"
    MISSING = "missing"
    DENIED = "denied"
    INVALID = "invalid"  # the kernel has no value: EINVAL, and its like
    GONE = "gone"  # the device went away while we looked
    HANGS = "hangs"


@dataclass(frozen=True, slots=True)
class Value:
    """`text` as it stands there, without the last newline; "" unless `answer` is ok. `errno`: the system's reason."""

    path: str
    answer: Answer
    text: str = ""
    errno: int = 0

    @property
    def is_ok(self) -> bool:
        """Whether there is a text."""
        return self.answer is Answer.OK

    def integer(self, base: int = 10) -> int | None:
        """The number it begins with; None where there is none."""
        word = self.text.split(":", 1)[0].strip() if base == 10 else self.text.strip()
        with contextlib.suppress(ValueError):
            return int(word, base)
        return None


class Reader:
    """Reads files, each within a deadline. One that once hung is not asked again."""

    def __init__(self, deadline_s: float = _DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._hanging: set[str] = set()

    def read(self, path: Path) -> Value:
        """Never raises, never hangs."""
        name = str(path)
        if name in self._hanging or len(self._hanging) >= _MOST_HANGING:
            return Value(name, Answer.HANGS)
        try:
            # What lies on a disk answers at once. A real sysfs asks a driver, which may not: that is a thread's work.
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
    """Whether reading it cannot block: a file with blocks on a disk, as sysfs has none, and no pipe."""
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
