"""The other ranks of an engine as its first rank sees them: their processes, messages to them, and their ends."""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import torch

from pdctl.engine.executor.pipe import (
    Dense,
    Failed,
    FromRank,
    Here,
    Join,
    Leave,
    Loaded,
    Pipe,
    PipeClosed,
    Refused,
    Room,
    Started,
    Step,
    ToRank,
)
from pdctl.engine.lifeline import vital
from pdctl.engine.model.inputs import Staged
from pdctl.engine.model.loading import ModelRefused
from pdctl.engine.model.parallel import RankLost
from pdctl.engine.options import EngineOptions
from pdctl.host import program

# Time for a rank to exit after its last word, or when it is asked to.
_EXIT_S = 5.0

Answer = TypeVar("Answer", Here, Loaded, Room, Started)


class _Rank:
    """One process. `said`: its answers; its end is the last one."""

    def __init__(self, options: EngineOptions, number: int, timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            given = dataclasses.replace(options, rank=number, rank_fd=theirs.fileno(), front_pid=os.getpid())
            argv = program.this_engine("rank", *given.to_argv())
            self.process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.number = number
        self.pipe = Pipe(ours, None)
        # Reading waits for as long as the rank lives; sending does not.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        self.said: queue.SimpleQueue[FromRank] = queue.SimpleQueue()

    def end(self, word: FromRank | None) -> FromRank:
        """Wait until the process has exited after its last `word`; why it has."""
        try:
            code = self.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        match word:
            case Refused(reason):
                return Refused(reason)
            case Failed(reason):
                return Failed(f"rank {self.number}: {reason}")
            case _:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return Failed(f"rank {self.number} {how}")


class OtherRanks:
    """See runner.Others. `lost`: called by any thread when a rank has ended, unless it was asked to."""

    def __init__(self, options: EngineOptions, lost: Callable[[str, bool], None], timeout_s: float) -> None:
        self._lost = lost
        self._leaving = False
        self._ranks = [_Rank(options, number, timeout_s) for number in range(1, options.num_ranks)]
        for rank in self._ranks:
            work = vital(lambda rank=rank: self._listen(rank))  # type: ignore[misc]
            threading.Thread(target=work, name=f"rank-{rank.number}", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """The processes, in the order of their ranks."""
        return [rank.process.pid for rank in self._ranks]

    def expect(self, kind: type[Answer], timeout_s: float) -> list[Answer]:
        """An answer of each rank. Raises ModelRefused or RankLost instead, with the reason of the first that ended."""
        deadline = time.monotonic() + timeout_s
        found = []
        for rank in self._ranks:
            try:
                answer = rank.said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise RankLost(f"rank {rank.number} did not answer within {timeout_s:g} s") from None
            if isinstance(answer, Refused):
                raise ModelRefused(answer.reason)
            if isinstance(answer, Failed):
                raise RankLost(answer.reason)
            assert isinstance(answer, kind), answer
            found.append(answer)
        return found

    def join(self, rendezvous: str) -> None:
        """Have all join the group that meets there."""
        self.tell(Join(rendezvous))

    def tell(self, message: ToRank) -> None:
        """Send a message to every rank. Raises RankLost."""
        for rank in self._ranks:
            self._send(rank, message)

    def tell_each(self, messages: Sequence[ToRank], fds: Sequence[int]) -> None:
        """Send each rank its message and its descriptor. Raises RankLost."""
        for rank, message, fd in zip(self._ranks, messages, fds, strict=True):
            self._send(rank, message, fd)

    def step(self, staged: Staged, gives_back: bool) -> None:
        """See Others.step."""
        assert not staged.following, "the tokens of a step before are only on the first rank"
        self.tell(Step(staged.shape, staged.data, gives_back))

    def dense(self, ids: torch.Tensor, implementation: str) -> None:
        """See Others.dense."""
        self.tell(Dense(ids.tolist(), implementation))

    def lose(self, reason: str) -> None:
        """The ranks cannot go on."""
        self._lost(reason, False)

    def leave(self) -> None:
        """Have all exit; those that do not are killed."""
        self._leaving = True
        for rank in self._ranks:
            try:
                rank.pipe.send(Leave())
            except PipeClosed:
                continue
        deadline = time.monotonic() + _EXIT_S
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        self.kill()

    def kill(self) -> None:
        """End all at once."""
        self._leaving = True
        for rank in self._ranks:
            rank.process.kill()
            rank.process.wait()

    def _send(self, rank: _Rank, message: ToRank, fd: int | None = None) -> None:
        try:
            rank.pipe.send(message, fd)
        except PipeClosed as failure:
            raise RankLost(f"rank {rank.number} does not take messages: {failure}") from failure

    def _listen(self, rank: _Rank) -> None:
        """Collect a rank's answers until it ends."""
        decode = msgspec.msgpack.Decoder(FromRank).decode
        word: FromRank | None = None
        while not isinstance(word, Refused | Failed):
            try:
                word = decode(rank.pipe.receive().data)
            except PipeClosed:
                word = None
                break
            if not isinstance(word, Refused | Failed):
                rank.said.put(word)
        end = rank.end(word)
        rank.pipe.close()
        rank.said.put(end)
        if not self._leaving and isinstance(end, Refused | Failed):
            self._lost(end.reason, isinstance(end, Refused))


def _timeval(seconds: float) -> bytes:
    """A struct timeval."""
    whole = int(seconds)
    return whole.to_bytes(8, "little") + int((seconds - whole) * 1e6).to_bytes(8, "little")
