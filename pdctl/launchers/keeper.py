"""Keeps one process of a node alive: adopts it or starts it, waits for its end, and starts it again.

It holds nothing that the process needs: a keeper that is killed is replaced by another, which finds the process.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pdctl import __version__
from pdctl.errors import PdctlError
from pdctl.host.processes.waiting import readable
from pdctl.launchers.daemon import Daemon
from pdctl.launchers.launcher import RUNNING, STARTING, WAITING, Standing

_SHORTEST_S, _LONGEST_S = 0.5, 30.0
# A process that lived so long starts anew with the shortest pause.
_STABLE_S = 60.0
# From its start, a process holds its lock after so long, seconds.
_LOCK_S = 120.0
_LOOK_S = 0.05


@dataclass(slots=True)
class Pauses:
    """How long to wait before the next start. Pure. There is no last one: a node without agent is of no use."""

    failures: int = 0

    def after(self, lived_s: float, luck: float) -> float:
        """A process has ended that lived so long; `luck` from 0 to 1."""
        self.failures = 1 if lived_s >= _STABLE_S else self.failures + 1
        pause_s = min(_LONGEST_S, _SHORTEST_S * 2.0 ** min(self.failures - 1, 10))
        return pause_s * (0.75 + luck / 2)


@dataclass(frozen=True, slots=True)
class Kept:
    """The process. `find` returns the pid of the one that runs; `start` starts another, and raises PdctlError;
    `last_words` returns why it ended, as its log says."""

    node: str
    find: Callable[[], int | None]
    start: Callable[[], Daemon]
    last_words: Callable[[], str]


class Keeper:
    """Runs in a thread of its own from `begin` to `release`."""

    def __init__(self, kept: Kept) -> None:
        self.standing = Standing(kept.node, pdctl=__version__)
        self._kept = kept
        self._pauses = Pauses()
        self._notes: tuple[str, ...] = ()
        self._awake, self._wake = os.pipe2(os.O_CLOEXEC)
        self._released = False
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def begin(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def release(self, within_s: float) -> bool:
        """Leave the process alone from now on. Returns whether that was reached: a start may be under way."""
        self._released = True
        os.write(self._wake, b"x")
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _keep(self) -> None:
        while not self._released:
            began = time.monotonic()
            try:
                pid = self._kept.find()
                started = None if pid is not None else self._start()
                if started is not None:
                    pid = self._until_found(started)
                if pid is not None:
                    self._watch(pid, is_adopted=started is None or started.pid != pid)
                reason = self._kept.last_words()
            except (PdctlError, OSError) as failure:
                reason = str(failure)
            if not self._released:
                self._pause(self._pauses.after(time.monotonic() - began, random.random()), reason)  # noqa: S311

    def _start(self) -> Daemon:
        self._tell(STARTING)
        started = self._kept.start()
        self._notes = started.notes
        return started

    def _until_found(self, started: Daemon) -> int | None:
        """Wait until the process, or one that was faster, is found. Returns None if it ended."""
        try:
            process = os.pidfd_open(started.pid)
        except ProcessLookupError:
            return self._kept.find()
        try:
            deadline = time.monotonic() + _LOCK_S
            while time.monotonic() < deadline:
                has_ended = self._has_ended(process, _LOOK_S)
                if (pid := self._kept.find()) is not None or has_ended:
                    return pid
            signal.pidfd_send_signal(process, signal.SIGKILL)
            raise PdctlError(f"it did not begin to work within {_LOCK_S:g} s, and was killed")
        finally:
            os.close(process)

    def _watch(self, pid: int, is_adopted: bool) -> None:
        """Returns when the process has ended, or is to be left alone."""
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if self._kept.find() != pid:
                return
            self._tell(RUNNING, pid, is_adopted)
            while not self._released and not self._has_ended(process, None):
                pass
        finally:
            os.close(process)

    def _pause(self, pause_s: float, reason: str) -> None:
        self._tell(WAITING, reason=reason)
        readable([self._awake], pause_s)

    def _has_ended(self, process: int, within_s: float | None) -> bool:
        waiting = [process] if within_s is not None else [process, self._awake]
        return process in readable(waiting, within_s)

    def _tell(self, state: str, pid: int = 0, is_adopted: bool = False, reason: str = "") -> None:
        notes = () if is_adopted else self._notes
        self.standing = Standing(self._kept.node, state, pid, is_adopted, reason, __version__, notes)
