"""Files that several processes of one user keep together: written whole, under a lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_LOOK_S = 0.05


def replace(path: Path, content: bytes) -> None:
    """Write a file so that readers find the old content or the new one, never a part. Raises OSError."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        # On a full disk a part of it may exist.
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock `path`. Raises OSError if another process holds it for longer than `seconds` (TimeoutError)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is locked by another process") from None
                time.sleep(_LOOK_S)
        yield
