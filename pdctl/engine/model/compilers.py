"""Compile grammars in separate processes, because a compilation can only be stopped by killing its process.

Fair by tenant: each has its own queue and at most one compilation at a time. A schema that is slow to compile delays
only its own tenant, and is stopped at its deadline or when no request needs it any more."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pdctl.host.processes.waiting import readable

_log = logging.getLogger(__name__)

_DEADLINE_S = 20.0
# Time limit for a new process to import the compiler, seconds.
_START_S = 60.0
# Number of concurrent processes, and seconds after which an idle one exits.
_WORKERS = 2
_IDLE_S = 120.0
# Interval of checks whether the result is still needed, seconds.
_LOOK_S = 0.05
# Limits of requests that wait for a compilation, per tenant and in total.
_MAX_WAITING_EACH, _MAX_WAITING = 32, 256
_MAX_REMEMBERED = 256
_LENGTH_BYTES = 4

# Called once with the compiled grammar and "", or with b"" and the reason.
Then = Callable[[bytes, str], None]


class BadGrammar(ValueError):
    """The client's grammar cannot be compiled; the message gives the reason."""


@dataclass(slots=True)
class _Job:
    grammar: str
    tenant: str
    is_wanted: Callable[[], bool]
    then: Then


class Compilers:
    """Queues, and threads that drive compiler processes; started with the first grammar.

    `argv`: the command of a compiler process (see `serve`).
    """

    def __init__(self, argv: list[str], deadline_s: float = _DEADLINE_S, start_s: float = _START_S) -> None:
        self._argv = argv
        self._deadline_s = deadline_s
        self._start_s = start_s
        # In round-robin order.
        self._queues: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._busy: set[str] = set()
        self._refused: OrderedDict[str, str] = OrderedDict()
        self._changed = threading.Condition()
        self._threads = 0
        self._closed = False

    def submit(self, grammar: str, tenant: str, is_wanted: Callable[[], bool], then: Then) -> None:
        """Compile a grammar when its turn comes. A grammar that once took too long is refused from then on."""
        with self._changed:
            reason = self._refused.get(grammar, "") or self._full(tenant)
            if not reason:
                self._queues.setdefault(tenant, deque()).append(_Job(grammar, tenant, is_wanted, then))
                if self._threads < _WORKERS:
                    self._threads += 1
                    threading.Thread(target=self._serve, name="grammar", daemon=True).start()
                self._changed.notify()
        if reason:
            then(b"", _worded(reason))

    def close(self) -> None:
        """Stop the processes and drop waiting jobs."""
        with self._changed:
            self._closed = True
            self._queues.clear()
            self._changed.notify_all()

    def audit(self) -> None:
        """Check that no empty queue is kept and that every busy tenant has a thread."""
        with self._changed:
            assert all(self._queues.values())
            assert len(self._busy) <= self._threads <= _WORKERS

    def _full(self, tenant: str) -> str:
        mine, all_ = len(self._queues.get(tenant, ())), sum(map(len, self._queues.values()))
        return "too many grammars are being compiled" if mine >= _MAX_WAITING_EACH or all_ >= _MAX_WAITING else ""

    def _serve(self) -> None:
        worker = _Worker(self._argv, self._start_s)
        try:
            while (job := self._next()) is not None:
                try:
                    if job.is_wanted():
                        self._run(worker, job)
                finally:
                    with self._changed:
                        self._busy.discard(job.tenant)
                        self._changed.notify()
        finally:
            worker.end()

    def _next(self) -> _Job | None:
        """The next job in round-robin order; None to end this thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._whose_turn() is not None, _IDLE_S)
            # Check under the lock, so that a job submitted at the timeout is not missed.
            tenant = self._whose_turn()
            if tenant is None:
                self._threads -= 1
                return None
            queue = self._queues[tenant]
            job = queue.popleft()
            if queue:
                self._queues.move_to_end(tenant)
            else:
                del self._queues[tenant]
            self._busy.add(tenant)
            return job

    def _whose_turn(self) -> str | None:
        return next((name for name in self._queues if name not in self._busy), None)

    def _run(self, worker: _Worker, job: _Job) -> None:
        try:
            compiled = worker.compile(job.grammar, job.is_wanted, self._deadline_s)
        except BadGrammar as failure:
            job.then(b"", _worded(str(failure)))
        except _NotWanted:
            pass
        except _Ended as failure:
            with self._changed:
                self._refused[job.grammar] = str(failure)
                while len(self._refused) > _MAX_REMEMBERED:
                    self._refused.popitem(last=False)
            job.then(b"", _worded(str(failure)))
        except OSError as failure:
            _log.warning("grammars cannot be compiled", exc_info=True)
            job.then(b"", _worded(f"its process cannot be started: {failure}"))
        else:
            job.then(compiled, "")


class _NotWanted(Exception):
    """The result is no longer needed."""


class _Ended(Exception):
    """The process exited or was killed while compiling this grammar."""


@dataclass(slots=True)
class _Worker:
    """One compiler process, replaced by a new one if it was killed."""

    argv: list[str]
    start_s: float
    process: subprocess.Popen[bytes] | None = field(default=None)

    def compile(self, grammar: str, is_wanted: Callable[[], bool], deadline_s: float) -> bytes:
        """Compile one grammar. Raises BadGrammar, _NotWanted, _Ended, OSError."""
        try:
            if self.process is None or self.process.poll() is not None:
                self.end()
                self.process = subprocess.Popen(self.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                self._read(is_wanted, self.start_s, "the compiling process does not start")
            assert self.process.stdin is not None
            _write(self.process.stdin.fileno(), grammar.encode())
            reply = self._read(is_wanted, deadline_s, f"it takes more than {deadline_s:g} s")
        except (_NotWanted, _Ended, OSError):
            self.end()
            raise
        if reply[:1] == b"0":
            raise BadGrammar(reply[1:].decode(errors="replace"))
        return reply[1:]

    def _read(self, is_wanted: Callable[[], bool], deadline_s: float, late: str) -> bytes:
        assert self.process is not None
        assert self.process.stdout is not None
        end, data, wanted = time.monotonic() + deadline_s, b"", _LENGTH_BYTES
        while len(data) < wanted:
            if readable([self.process.stdout.fileno()], _LOOK_S):
                part = os.read(self.process.stdout.fileno(), 1 << 20)
                if not part:
                    raise _Ended("the compiling process ended over it")
                data += part
                if len(data) >= _LENGTH_BYTES:
                    wanted = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
            elif not is_wanted():
                raise _NotWanted
            elif time.monotonic() > end:
                raise _Ended(late)
        return data[_LENGTH_BYTES:]

    def end(self) -> None:
        """Kill the process and wait for it."""
        if self.process is None:
            return
        with self.process as process:
            process.kill()
        self.process = None


def serve(compile_one: Callable[[str], bytes]) -> None:
    """A compiler process: reports that it is ready, then reads grammars from stdin and answers on stdout until EOF.

    A frame is a length of four bytes and that many bytes. Answers begin with "1" (compiled) or "0" (the reason why
    not)."""
    source, target = 0, os.dup(1)
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    _write(target, b"1")
    while (head := _exactly(source, _LENGTH_BYTES)) is not None:
        grammar = _exactly(source, int.from_bytes(head, "big"))
        if grammar is None:
            return
        try:
            _write(target, b"1" + compile_one(grammar.decode()))
        except BadGrammar as failure:
            _write(target, b"0" + str(failure).encode())


def _exactly(descriptor: int, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        part = os.read(descriptor, count - len(data))
        if not part:
            return None
        data += part
    return data


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
    while left:
        left = left[os.write(descriptor, left) :]


def _worded(reason: str) -> str:
    return f"the grammar cannot be compiled: {reason}"
