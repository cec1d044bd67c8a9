"""A thread that compiles grammars, with a deadline: what is stuck in a library cannot be stopped, only left behind."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

_log = logging.getLogger(__name__)

_DEADLINE_S = 20.0
# Threads left behind in compilations that went on past their deadline, and requests waiting for the thread.
_MAX_STUCK = 2
_MAX_WAITING = 256
_MAX_REMEMBERED = 256


class BadGrammar(ValueError):
    """What the client asked for cannot be compiled, with the reason."""


@dataclass(slots=True)
class _Job:
    work: Callable[[], object]
    key: str
    is_wanted: Callable[[], bool]
    then: Callable[[str], None]
    is_late: bool = False


class Compilers:
    """Runs jobs one after another; `then` is called with "" or the reason, once for each that is still wanted."""

    def __init__(self, deadline_s: float = _DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._waiting: deque[_Job] = deque()
        self._refused: OrderedDict[str, str] = OrderedDict()
        self._changed = threading.Condition()
        self._stuck = 0
        self._serving = False

    def submit(
        self, work: Callable[[], object], key: str, is_wanted: Callable[[], bool], then: Callable[[str], None]
    ) -> None:
        """`key`: what took too long once is refused from then on."""
        with self._changed:
            reason = self._refused.get(key, "")
            if not reason and (self._stuck > _MAX_STUCK or len(self._waiting) >= _MAX_WAITING):
                reason = "too many grammars are being compiled"
            if not reason:
                self._waiting.append(_Job(work, key, is_wanted, then))
                self._start()
                self._changed.notify()
        if reason:
            then(_worded(reason))

    def _start(self) -> None:
        if not self._serving and self._stuck <= _MAX_STUCK:
            self._serving = True
            threading.Thread(target=self._serve, name="grammar", daemon=True).start()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                job = self._waiting.popleft()
            if job.is_wanted() and not self._run(job):
                return

    def _run(self, job: _Job) -> bool:
        """False when another thread has taken this one's place."""
        timer = threading.Timer(self._deadline_s, self._left_behind, [job])
        timer.daemon = True
        timer.start()
        reason = _outcome(job.work)
        timer.cancel()
        with self._changed:
            if job.is_late:
                self._stuck -= 1
                self._start()
                return False
            # From here on it is not late any more.
            job.key = ""
        job.then(_worded(reason))
        return True

    def _left_behind(self, job: _Job) -> None:
        with self._changed:
            if not job.key:
                return
            job.is_late = True
            self._stuck += 1
            self._serving = False
            reason = f"it takes more than {self._deadline_s:g} s"
            self._refused[job.key] = reason
            while len(self._refused) > _MAX_REMEMBERED:
                self._refused.popitem(last=False)
            self._start()
            given_up = [] if self._serving else list(self._waiting)
            if given_up:
                self._waiting.clear()
        job.then(_worded(reason))
        for other in given_up:
            other.then(_worded("too many grammars are being compiled"))


def _outcome(work: Callable[[], object]) -> str:
    try:
        work()
    except BadGrammar as failure:
        return str(failure)
    except Exception as failure:  # noqa: BLE001 - this thread's outermost frame: whoever waits must hear of it
        _log.warning("compiling a grammar failed", exc_info=True)
        return f"{type(failure).__name__}: {failure}"
    return ""


def _worded(reason: str) -> str:
    return reason and f"the grammar cannot be compiled: {reason}"
