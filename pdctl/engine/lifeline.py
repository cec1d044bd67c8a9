"""Tie processes together: the kernel signals a child when its parent exits."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(sign: signal.Signals, parent_pid: int) -> None:
    """Request signal `sign` for when the parent exits; raise it at once if `parent_pid` is no longer the parent."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(sign), 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), sign)


def vital(work: Callable[[], None]) -> Callable[[], None]:
    """Wrap an essential thread: an error in it ends the process, which otherwise would only look alive."""

    def run() -> None:
        try:
            work()
        except BaseException:
            logging.exception("a thread of the engine failed; the engine ends")
            os._exit(1)

    return run
