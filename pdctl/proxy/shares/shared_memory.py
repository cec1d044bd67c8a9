"""Memory that all workers of a proxy see."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path

from pdctl import __version__

_log = logging.getLogger(__name__)


def shared_memory(path: Path, size: int) -> mmap.mmap:
    """Memory of a file, `size` bytes, at first zeroes. If there is no room for it, memory of this worker alone.

    Each version of pdctl has its own file: during an upgrade, workers of two versions run, and may read different
    things out of the same bytes."""
    path = path.with_name(f"{path.name}-{__version__}")
    try:
        with path.open("a+b") as file:
            # Never shorter: another worker may have it mapped, and would end with a SIGBUS.
            os.ftruncate(file.fileno(), max(size, os.fstat(file.fileno()).st_size))
            # A hole would be filled at the first write to it: on a full disk, that is a SIGBUS.
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as failure:
        _log.warning("%s cannot be made: %s; this worker does without what others know", path, failure.strerror)
        return mmap.mmap(-1, size)
