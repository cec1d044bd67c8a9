"""Numbered batches of KV events of one engine, applied in order: what was missed, repeated, or is of a new start. Pure.

An engine numbers its batches from 0 with each start, loses what a subscriber does not read in time, and replays the
newest ones on request. The last batch that is known is asked for again each time: an engine that does not have it, or
has another one of that number, was restarted.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from pdctl.kv_events import AllBlocksCleared
from pdctl.proxy.engines.prefixes.blocks import BlockIndex, Heard


class Numbered(msgspec.Struct, frozen=True, array_like=True):
    """vLLM's KVEventBatch, as it is read."""

    ts: float
    events: list[Heard]


_decode = msgspec.msgpack.Decoder(Numbered).decode


class NotEvents(Exception):
    """What came is no batch of events, or nothing came."""


class OtherForm(NotEvents):
    """What came is no batch of events. To ask for it again would not help."""


def parsed(payload: bytes) -> Numbered:
    """A batch. Raises OtherForm."""
    try:
        return _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise OtherForm(f"its events have another form than vLLM's: {failure}") from failure


class Verdict(Enum):
    """What a batch is. FOLLOWS: it was applied. REPEATED: it was known. MISSED: others must come before it. RESTARTED:
    it is of a new start of the engine."""

    FOLLOWS = "follows"
    REPEATED = "repeated"
    MISSED = "missed"
    RESTARTED = "restarted"


class Batches:
    """`index`: the blocks after the last batch; `clears`: how often all of them were dropped."""

    def __init__(self) -> None:
        self.index = BlockIndex()
        self.clears = 0
        self._next = 0
        self._ts = 0.0
        self._asked = 0
        self._is_first = True

    def begin(self) -> None:
        """Nothing is known: all batches are wanted."""
        self.index = BlockIndex()
        self._next, self._ts = 0, 0.0

    def ask(self) -> int:
        """The number of the first batch that a replay must have: the last one that is known."""
        self._asked, self._is_first = max(0, self._next - 1), True
        return self._asked

    def replayed(self, number: int, batch: Numbered) -> Verdict:
        """A batch of the replay. MISSED: the reply has lost some, so ask again."""
        is_first, self._is_first = self._is_first, False
        if number == self._next - 1 and batch.ts != self._ts:
            return Verdict.RESTARTED
        if number > self._next and is_first:
            # The engine does not have the others any more.
            self.index.clear(is_complete=False)
            self._next = number
        return self._judged(number, batch)

    def end(self) -> Verdict:
        """The replay is over. FOLLOWS: everything up to now is known."""
        if not self._is_first:
            return Verdict.FOLLOWS
        if self._next:
            return Verdict.RESTARTED
        # It has published nothing yet.
        self.index.clear(is_complete=True)
        return Verdict.FOLLOWS

    def take(self, number: int, batch: Numbered) -> Verdict:
        """A batch that was just published."""
        if number < self._next and batch.ts > self._ts:
            return Verdict.RESTARTED
        return self._judged(number, batch)

    def _judged(self, number: int, batch: Numbered) -> Verdict:
        if number != self._next:
            return Verdict.MISSED if number > self._next else Verdict.REPEATED
        if not number:
            self.index.clear(is_complete=True)
        for event in batch.events:
            self.index.take(event)
            self.clears += isinstance(event, AllBlocksCleared)
        self._next, self._ts = number + 1, batch.ts
        return Verdict.FOLLOWS

    def audit(self) -> None:
        """Check the index."""
        assert self._next or not len(self.index), "blocks without a batch"
        self.index.audit()
