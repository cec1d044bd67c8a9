"""Writes an identity's files so that no reader sees half of one, and nobody else reads a key."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pdctl.errors import PdctlError


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file in one step. Raises PdctlError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as failure:
        # This may fail for the same reason.
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise PdctlError(f"{path} cannot be written: {failure.strerror}") from failure


def write_identity(folder: Path, ca: bytes, certificate: bytes, key: bytes) -> None:
    """Write the files that a process reads. One that reads between two of them finds that they do not fit, and reads
    again. The certificate comes last: a folder that has one has all."""
    write_file(folder / "node.key", key)
    write_file(folder / "ca.pem", ca, 0o644)
    write_file(folder / "node.pem", certificate, 0o644)
