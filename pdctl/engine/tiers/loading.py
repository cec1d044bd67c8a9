"""Answers what the tiers have of a prompt, and copies it into blocks, beside the step loop."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pdctl.engine.ipc.messages import Load, Look, Pulled, Seen
from pdctl.engine.lifeline import vital
from pdctl.engine.tiers import Rows, Tier, TierFailed
from pdctl.engine.tiers.blocks import WholeBlocks

_log = logging.getLogger(__name__)

_THREADS = 2
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


class Loader:
    """`begin`: called before a request's blocks are written to; False if the request is gone. `loaded`: called after
    that with the result. `answer`: called with what needs no end."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        blocks: WholeBlocks,
        begin: Callable[[str], bool],
        loaded: Callable[[Pulled], None],
        answer: Callable[[Seen | Pulled], None],
    ) -> None:
        self._tiers = tiers
        self._blocks = blocks
        self._begin = begin
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
        began = time.perf_counter()
        rows, error = self._rows(load.names)
        if not len(rows):
            self._answer(Pulled(load.request_id, error or "it is not there any more", 0.0, 0))
        elif not self._begin(load.request_id):
            self._answer(Pulled(load.request_id, "the request is gone", 0.0, 0))
        else:
            self._blocks.write(load.block_ids[: len(rows)], rows)
            seconds = time.perf_counter() - began
            self._loaded(Pulled(load.request_id, "", seconds, rows.nbytes, blocks=len(rows)))

    def _rows(self, names: Sequence[bytes]) -> tuple[Rows, str]:
        """The first blocks, as many as come, and why others do not."""
        parts, found, error = [np.empty((0, self._blocks.block_bytes), np.uint8)], 0, ""
        for tier, speed in zip(self._tiers, self._speeds, strict=True):
            if found == len(names) or not tier.is_there:
                continue
            began = time.perf_counter()
            try:
                rows = tier.get(names[found:])
            except TierFailed as failure:
                error = str(failure)
                continue
            if len(rows):
                speed.note(len(rows), time.perf_counter() - began)
                found += len(rows)
                parts.append(rows)
        return np.concatenate(parts), error
