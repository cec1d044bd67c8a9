"""The run directory of a service: lock, control socket, plan, state. Gone when the service is down."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

from pdctl.errors import AlreadyRunning, PdctlError

_LONGEST_SOCKET_PATH = 107  # sun_path in linux/un.h, without the final zero


class RunDir:
    """Locked for as long as the supervisor lives; the kernel lets go of the lock when it dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def control_socket(self) -> Path:
        """Where the supervisor answers."""
        return self.path / "control.sock"

    def acquire(self) -> None:
        """Create and lock. Raises AlreadyRunning, PdctlError."""
        if len(str(self.control_socket)) > _LONGEST_SOCKET_PATH:
            hint = "set PDCTL_RUN to a shorter directory, such as /tmp/pd"
            raise PdctlError(f"the run directory {self.path} is too long for a unix socket", hint)
        self._make_private(self.path.parent)
        self._make_private(self.path)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            os.close(self._lock)
            self._lock = None
            name = self.path.name
            hint = f"look at it with: pdctl status -s {name}    stop it with: pdctl down -s {name}"
            raise AlreadyRunning(f"service {name!r} is already running (supervisor pid {holder})", hint) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def write_json(self, name: str, value: object) -> Path:
        """Write a file of the directory in one piece."""
        target = self.path / name
        scratch = target.with_suffix(".tmp")
        scratch.write_text(json.dumps(value, indent=1))
        scratch.replace(target)
        return target

    def write_private(self, name: str, text: str) -> None:
        """Write a file that only this user may read."""
        target = self.path / name
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)

    def release(self, keep: bool = False) -> None:
        """Let go of the lock; remove the directory unless somebody still lives in it."""
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear(self) -> None:
        """Remove what a dead supervisor left, but for the lock."""
        for entry in self.path.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    entry.unlink()

    def _make_private(self, path: Path) -> None:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = path.stat().st_uid
        except OSError as failure:
            raise PdctlError(f"the run directory {path} cannot be made: {failure}", "set PDCTL_RUN") from failure
        if owner != os.getuid():
            raise PdctlError(f"the run directory {path} belongs to another user (uid {owner})", "set PDCTL_RUN")


def is_locked(path: Path) -> bool:
    """Whether a supervisor holds this run directory."""
    try:
        lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
