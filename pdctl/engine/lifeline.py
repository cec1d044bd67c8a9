"""Processes that live and die together: the kernel signals a child when its parent ends."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(sign: signal.Signals, parent_pid: int) -> None:
    """Ask for `sign` when the parent ends; take it at once if `parent_pid` is not our parent any more."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(sign), 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), sign)


def vital(work: Callable[[], None]) -> Callable[[], None]:
    """For a thread without which its process only looks alive: an error that ends it ends the process."""

    def run() -> None:
        try:
            work()
        except BaseException:
            logging.exception("a thread of the engine failed; the engine ends")
            os._exit(1)

    return run
