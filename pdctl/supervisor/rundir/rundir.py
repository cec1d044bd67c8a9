"""The run directory of a service: lock, control socket, plan, state. It is removed when the service is down."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

from pdctl.errors import AlreadyRunning, PdctlError
from pdctl.host.processes.presence import LOCK, supervisor_of

SPACE_HINT = "free space there, or set PDCTL_RUN to another directory"
_LOCK_TRIES, _LOCK_PAUSE_S = 20, 0.005
_LONGEST_SOCKET_PATH = 107  # sun_path in linux/un.h, without the final zero


class RunDir:
    """Locked as long as the supervisor lives; the kernel releases the lock when it dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def control_socket(self) -> Path:
        """The socket of the control API."""
        return self.path / "control.sock"

    def acquire(self) -> None:
        """Create and lock. Raises AlreadyRunning, PdctlError."""
        if len(str(self.control_socket)) > _LONGEST_SOCKET_PATH:
            hint = "set PDCTL_RUN to a shorter path, such as /tmp/pd"
            raise PdctlError(f"the run directory {self.path} is too long for a unix socket", hint)
        self._make_private(self.path.parent)
        self._make_private(self.path)
        # Also finds a supervisor whose lock file was removed.
        holder = supervisor_of(self.path)
        if holder is not None or not self._take_lock():
            name = self.path.name
            hint = f"see it with: pdctl status -s {name}    stop it with: pdctl down -s {name}"
            raise AlreadyRunning(f"service {name!r} is already running (supervisor pid {holder})", hint)

    def restore(self) -> bool:
        """Restore the directory and the lock if they were removed. Returns whether anything was missing.

        Raises PdctlError if they cannot be created, or if another supervisor holds them now.
        """
        assert self._lock is not None
        with contextlib.suppress(OSError):
            if (self.path / LOCK).stat().st_ino == os.fstat(self._lock).st_ino:
                return False
        self._make_private(self.path.parent)
        self._make_private(self.path)
        before = self._lock
        if not self._take_lock():
            self._lock = before
            raise PdctlError(f"another supervisor holds {self.path} now")
        os.close(before)
        return True

    def _take_lock(self) -> bool:
        try:
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _lock_soon(self._lock)
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            assert self._lock is not None
            os.close(self._lock)
            self._lock = None
            return False
        except OSError as failure:
            raise PdctlError(f"{self.path / LOCK} cannot be written: {failure.strerror}", SPACE_HINT) from failure
        return True

    def write_json(self, name: str, value: object) -> Path:
        """Write a file of the directory atomically."""
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
        """Release the lock; remove the directory, unless `keep`."""
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear(self) -> None:
        """Remove everything that a dead supervisor left, except the lock."""
        for entry in self.path.iterdir():
            if entry.name == LOCK:
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
            raise PdctlError(f"the run directory {path} cannot be created: {failure}", "set PDCTL_RUN") from failure
        if owner != os.getuid():
            raise PdctlError(f"the run directory {path} belongs to another user (uid {owner})", "set PDCTL_RUN")


def _lock_soon(descriptor: int) -> None:
    """Lock it exclusively. Retried, because a check holds the lock for microseconds. Raises BlockingIOError."""
    for _ in range(_LOCK_TRIES):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_LOCK_PAUSE_S)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
