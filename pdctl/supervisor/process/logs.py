"""A file for each process and incarnation, given to the child itself: no pipe, so nobody's death or delay blocks it.

What is too large is cut at its beginning, where the child no longer writes: those bytes are first kept in an archive
beside it, then the file's blocks there are given back (a hole is punched). The child notices nothing, and no line is
lost, which renaming or truncating a file in use cannot promise.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

# Logs of earlier incarnations that are kept.
KEPT = 5
_PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h
_BLOCK = 4096
_CHUNK = 1 << 20
# How far back a process's own reason for its end is looked for, and how much of it is told.
_LAST_LINES, _LONGEST_REASON = 20, 500

_libc = ctypes.CDLL(None, use_errno=True)


def open_new(path: Path) -> int:
    """A descriptor for a new incarnation's output; the last one's becomes PATH.1, and so on. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        for number in range(KEPT, 0, -1):
            before = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
            with contextlib.suppress(FileNotFoundError):
                before.replace(path.with_name(f"{path.name}.{number}"))
        archive_of(path).unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def by_inode(path: Path, inode: int) -> Path:
    """The file among a process's logs that has this inode; the newest where none has."""
    for found in (path, *(path.with_name(f"{path.name}.{number}") for number in range(1, KEPT + 1))):
        with contextlib.suppress(OSError):
            if found.stat().st_ino == inode:
                return found
    return path


def archive_of(path: Path) -> Path:
    """Where the part that was cut from a log last is."""
    return path.with_name(f"{path.name}.old")


def first_byte(file: int) -> int:
    """Where a log's text begins: after the hole."""
    try:
        return os.lseek(file, 0, os.SEEK_DATA)
    except OSError:
        return 0


def cap(path: Path, most: int) -> bool:
    """Cut a log that takes more than `most` bytes of disk to half of that; whether that was done. Raises OSError."""
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
    """Cut every log that is too large; `say` is told, by process."""
    for path in paths:
        try:
            if cap(path, most):
                say(path.stem, f"log cut; its older half is in {archive_of(path)}")
        except OSError as failure:
            say(path.stem, f"its log cannot be cut: {failure.strerror}")


def _copy(source: int, start: int, end: int, target: Path) -> None:
    """Bytes of a log into its archive, which holds the last cut only."""
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
        raise OSError(code, f"this file system cannot cut logs: {os.strerror(code or errno.EOPNOTSUPP)}")


def tail(path: Path, lines: int, most: int = 64 * 1024) -> list[str]:
    """The last lines of a log; none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(first_byte(file.fileno()), size - most))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def last_error(path: Path) -> str:
    """What a process said of its own failure: its last line that begins with "error: ", without that."""
    lines = [line for line in tail(path, _LAST_LINES) if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ")[:_LONGEST_REASON] if lines else ""
