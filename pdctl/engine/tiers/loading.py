"""Answers what the tiers have of a prompt, and copies it into blocks, beside the step loop."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdctl.engine.ipc.messages import Load, Look, Pulled, Seen
from pdctl.engine.lifeline import vital
from pdctl.engine.tiers import Rows, Tier, TierFailed
from pdctl.engine.tiers.blocks import WholeBlocks

_log = logging.getLogger(__name__)

_THREADS = 2
# Blocks that are read and written at once.
_AT_ONCE = 32
# Questions and loads that wait, at most; more are answered with nothing.
_MOST_WAITING = 64
# Until a tier was read from: what a read takes beside its blocks, seconds, and bytes per second.
_EXTRA_S, _USUAL_SPEED = 0.002, 1e9
# Weight of the newest read in the average.
_ALPHA = 0.3


@dataclass(slots=True)
class Speed:
    """How long a tier's reads take: a part that is always the same, and a part for each block."""

    block_s: float

    def predicted_s(self, blocks: int) -> float:
        """Of a read of so many blocks, seconds."""
        return _EXTRA_S + blocks * self.block_s

    def note(self, blocks: int, seconds: float) -> None:
        """A read has taken so long."""
        block_s = max(0.0, seconds - _EXTRA_S) / blocks
        self.block_s += _ALPHA * (block_s - self.block_s)


class Pulls(Protocol):
    """The scheduler's side of what is written into reserved blocks."""

    def pull_started(self, request_id: str) -> bool:
        """Writing begins. False: the request is gone, nothing may be written."""
        ...

    def pull_wanted(self, request_id: str) -> bool:
        """Whether the request still waits for it."""
        ...


class Loader:
    """`loaded`: called with the result after a request's blocks were written to; `answer`: with all others."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        blocks: WholeBlocks,
        pulls: Pulls,
        loaded: Callable[[Pulled], None],
        answer: Callable[[Seen | Pulled], None],
    ) -> None:
        self._tiers = tiers
        self._blocks = blocks
        self._pulls = pulls
        self._loaded = loaded
        self._answer = answer
        self._speeds = [Speed(blocks.block_bytes / _USUAL_SPEED) for _ in tiers]
        self._work: queue.Queue[Look | Load | None] = queue.Queue(_MOST_WAITING)
        for number in range(_THREADS):
            threading.Thread(target=vital(self._run), name=f"load-{number}", daemon=True).start()

    def submit(self, work: Look | Load) -> None:
        """Queue work. Never blocks."""
        try:
            self._work.put_nowait(work)
        except queue.Full:
            self._refuse(work, "too many prompts are loaded")

    def close(self) -> None:
        """Take no more work."""
        for _ in range(_THREADS):
            try:
                self._work.put_nowait(None)
            except queue.Full:
                return

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if isinstance(work, Look):
                self._answer(Seen(work.request_id, self._look(work.names)))
            else:
                self._load(work)

    def _refuse(self, work: Look | Load, reason: str) -> None:
        is_question = isinstance(work, Look)
        self._answer(Seen(work.request_id, []) if is_question else Pulled(work.request_id, reason, 0.0, 0))

    def _look(self, names: Sequence[bytes]) -> list[tuple[int, float]]:
        """After each tier: how many of the first blocks there are in all, and the seconds to read them."""
        found, seconds = 0, 0.0
        runs: list[tuple[int, float]] = []
        for tier, speed in zip(self._tiers, self._speeds, strict=True):
            try:
                count = tier.leading(names[found:]) if tier.is_there and found < len(names) else 0
            except TierFailed as failure:
                _log.info("a prompt is not looked for in the %s: %s", tier.name, failure)
                continue
            if count:
                found, seconds = found + count, seconds + speed.predicted_s(count)
                runs.append((found, seconds))
        return runs

    def _load(self, load: Load) -> None:
        began, done, error = time.perf_counter(), 0, ""
        try:
            for rows in self._pieces(load.names):
                if not (
                    self._pulls.pull_wanted(load.request_id) if done else self._pulls.pull_started(load.request_id)
                ):
                    error = "the request is gone"
                    break
                self._blocks.write(load.block_ids[done : done + len(rows)], rows)
                done += len(rows)
        except TierFailed as failure:
            error = str(failure)
        if not done:
            # No write has begun, so the core need not know.
            self._answer(Pulled(load.request_id, error or "it is not there any more", 0.0, 0))
            return
        num_bytes = done * self._blocks.block_bytes
        self._loaded(Pulled(load.request_id, "", time.perf_counter() - began, num_bytes, blocks=done))

    def _pieces(self, names: Sequence[bytes]) -> Iterator[Rows]:
        """The first blocks, as many as come, in pieces. Raises TierFailed if a tier failed, and none gave the rest."""
        found, failed = 0, None
        for tier, speed in zip(self._tiers, self._speeds, strict=True):
            try:
                for rows in _read(tier, speed, names[found:] if tier.is_there else ()):
                    found += len(rows)
                    yield rows
            except TierFailed as failure:
                failed = failure
        if failed is not None and found < len(names):
            raise failed


def _read(tier: Tier, speed: Speed, names: Sequence[bytes]) -> Iterator[Rows]:
    """The first of these blocks, up to one that the tier does not have. Raises TierFailed."""
    for at in range(0, len(names), _AT_ONCE):
        began, wanted = time.perf_counter(), names[at : at + _AT_ONCE]
        rows = tier.get(wanted)
        if len(rows):
            speed.note(len(rows), time.perf_counter() - began)
            yield rows
        if len(rows) < len(wanted):
            return
