"""A process's log piece by piece, for whoever cannot open its files: each piece names the place behind it.

A place is a file and an offset in it. The file is known by its inode, because its name changes at the next start.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from pdctl.control_api import LogPart
from pdctl.supervisor.process.logs import KEPT, archive_of, first_byte

# Bytes of one piece.
_MOST = 256 * 1024
_PLACE = re.compile(r"([0-9]{1,20})\.([0-9]{1,20})")


def log_names(folder: Path) -> tuple[str, ...]:
    """The processes that have logs in a folder."""
    return tuple(sorted(path.stem for path in folder.glob("*.log")))


def read_part(folder: Path, name: str, place: str, previous: bool, last: int) -> LogPart:
    """Whole lines behind a place; for "" those of the last `last` bytes of this start, or with `previous` from the
    oldest that is kept. Raises LookupError if the process has no log."""
    if name not in log_names(folder):
        raise LookupError(f"no log of {name!r}; known: {', '.join(log_names(folder)) or 'none'}")
    path = folder / f"{name}.log"
    files = _files(path)
    if (found := _PLACE.fullmatch(place)) is not None and (number := _position(files, int(found[1]))) is not None:
        offset = int(found[2])
    elif previous and not found:
        number, offset = 0, 0
    else:
        number, offset = max(0, len(files) - 1), 0 if found else _near_end(path, last)
    for inode, file in files[number:]:
        is_last = file == path
        data, start = _read(file, offset, is_last)
        if data or is_last:
            return LogPart(place=f"{inode}.{start + len(data)}", text=data.decode(errors="replace"), more=bool(data))
        offset = 0
    # It was removed meanwhile.
    return LogPart(place="", text="", more=False)


def _files(path: Path) -> list[tuple[int, Path]]:
    """Inode and path of a log's files, oldest first: earlier starts, the part cut from this start's, this start's."""
    earlier = [path.with_name(f"{path.name}.{number}") for number in range(KEPT, 0, -1)]
    found = []
    for part in (*earlier, archive_of(path), path):
        with contextlib.suppress(OSError):
            found.append((part.stat().st_ino, part))
    return found


def _position(files: list[tuple[int, Path]], inode: int) -> int | None:
    return next((number for number, (known, _) in enumerate(files) if known == inode), None)


def _near_end(path: Path, last: int) -> int:
    """Where the first line begins that is in the last bytes as a whole."""
    try:
        with path.open("rb") as file:
            start = file.seek(0, os.SEEK_END) - last
            if start <= first_byte(file.fileno()):
                return 0
            file.seek(start - 1)
            file.readline()
            return file.tell()
    except OSError:
        return 0


def _read(path: Path, offset: int, is_growing: bool) -> tuple[bytes, int]:
    """Whole lines from an offset on, and where they begin; of a file that does not grow, also the rest of the last."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            # The cut-off beginning of a log is a hole.
            start = max(offset if offset <= size else 0, min(first_byte(file.fileno()), size))
            file.seek(start)
            data = file.read(_MOST)
    except OSError:
        return b"", offset
    end = data.rfind(b"\n") + 1
    # A line without an end is still being written, or longer than a piece, or the last one of a process.
    return (data[:end] if end or (is_growing and len(data) < _MOST) else data), start
