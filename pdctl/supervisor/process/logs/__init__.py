"""Log files, one per process and incarnation. The child writes to it directly, so no slow or dead reader blocks it.

A log that grows too large is cut at its start, where the child no longer writes: the bytes are copied to an archive
beside the log, then their disk blocks are freed by punching a hole. The child is not affected and no line is lost;
renaming or truncating a file in use cannot guarantee that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

# Number of logs kept from earlier incarnations.
KEPT = 5
_PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h
_BLOCK = 4096
_CHUNK = 1 << 20
# Last lines searched for the error that a process logged before its exit, and characters reported of that error.
_LAST_LINES, _LONGEST_REASON = 20, 500

_libc = ctypes.CDLL(None, use_errno=True)


def open_new(path: Path) -> int:
    """Open the log of a new incarnation; the previous log becomes PATH.1, and so on. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        for number in range(KEPT, 0, -1):
            before = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
            with contextlib.suppress(FileNotFoundError):
                before.replace(path.with_name(f"{path.name}.{number}"))
        archive_of(path).unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def by_inode(path: Path, inode: int) -> Path:
    """The file with this inode among a process's logs; the newest file if none has it."""
    for found in (path, *(path.with_name(f"{path.name}.{number}") for number in range(1, KEPT + 1))):
        with contextlib.suppress(OSError):
            if found.stat().st_ino == inode:
                return found
    return path


def archive_of(path: Path) -> Path:
    """The file with the part that was last cut from a log."""
    return path.with_name(f"{path.name}.old")


def first_byte(file: int) -> int:
    """The offset of the first byte of a log after its hole."""
    try:
        return os.lseek(file, 0, os.SEEK_DATA)
    except OSError:
        return 0


def cap(path: Path, most: int) -> bool:
    """Cut a log that uses more than `most` bytes of disk to half of that. Whether it was cut. Raises OSError."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    if found.st_blocks * 512 <= most:
        return False
    with path.open("r+b", buffering=0) as file:
        start = first_byte(file.fileno())
        end = (found.st_size - most // 2) // _BLOCK * _BLOCK
        if end <= start:
            return False
        _copy(file.fileno(), start, end, archive_of(path))
        _punch(file.fileno(), end)
    return True


def cap_all(paths: Iterable[Path], most: int, say: Callable[[str, str], None]) -> None:
    """Cut every log that is too large; `say(process, message)` reports each."""
    for path in paths:
        try:
            if cap(path, most):
                say(path.stem, f"log truncated; the older half is in {archive_of(path)}")
        except OSError as failure:
            say(path.stem, f"the log cannot be truncated: {failure.strerror}")


def _copy(source: int, start: int, end: int, target: Path) -> None:
    """Copy bytes of a log into its archive. The archive holds the last cut only."""
    scratch = target.with_name(f"{target.name}.new")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        at = start
        while at < end:
            part = os.pread(source, min(_CHUNK, end - at), at)
            out.write(part)
            at += len(part)
    scratch.replace(target)


def _punch(file: int, end: int) -> None:
    if _libc.fallocate(file, _PUNCH, ctypes.c_long(0), ctypes.c_long(end)) != 0:
        code = ctypes.get_errno()
        raise OSError(
            code, f"this file system cannot truncate logs at the start: {os.strerror(code or errno.EOPNOTSUPP)}"
        )


def tail(path: Path, lines: int, most: int = 64 * 1024) -> list[str]:
    """The last lines of a log; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(first_byte(file.fileno()), size - most))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def last_error(path: Path) -> str:
    """The error that a process logged: its last line that begins with "error: ", without that prefix."""
    lines = [line for line in tail(path, _LAST_LINES) if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ")[:_LONGEST_REASON] if lines else ""
