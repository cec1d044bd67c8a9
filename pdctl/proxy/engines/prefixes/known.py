"""The beginnings of prompts that an engine has KV of, as far as it tells, or as this proxy has seen. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pdctl.net.prefixes.beginnings import PIECE_BYTES
from pdctl.net.prefixes.told import Told
from pdctl.proxy.engines.prefixes.batches import Batches, Verdict, parsed
from pdctl.proxy.engines.prefixes.places import NO_BLOCK, Places
from pdctl.wire import BlocksCall, BlocksReply

_MOST_PIECES = 65536
# An answered prompt counts for so long at an engine that tells what it has: by then it has told of it.
_TOLD_WITHIN_S = 1.0
# An engine with nothing to tell answers after the first time; after the second, what it told before counts no more.
WAIT_S, _STALE_S = 10.0, 25.0


class KnownPrefixes:
    """What is known of one engine. Without its word, the newest prompts that it has computed; times are monotonic.

    Its word is what it tells of pieces, or what its KV events say of blocks (`batches`); `places`: where pieces end."""

    def __init__(self, places: Places | None = None) -> None:
        self._seen: OrderedDict[int, float] = OrderedDict()
        self._told = Told()
        self._told_at: float | None = None
        self._places = places or Places()
        self.batches = Batches()
        self._is_by_blocks = False

    def add(self, pieces: Sequence[int], now: float) -> None:
        """It has computed this prompt; the pieces that were used longest ago are dropped."""
        for piece in pieces:
            self._seen[piece] = now
            self._seen.move_to_end(piece)
        while len(self._seen) > _MOST_PIECES:
            self._seen.popitem(last=False)

    def call(self) -> BlocksCall:
        """What to ask it."""
        return self._told.call(WAIT_S)

    def heard(self, reply: BlocksReply, now: float) -> bool:
        """Its answer to `call`. One that does not follow what is known makes everything unknown; returns False then."""
        follows, self._is_by_blocks = self._told.heard(reply), False
        self._told_at = now if follows else None
        return follows

    def heard_batch(self, number: int, payload: bytes, now: float) -> Verdict:
        """A batch of its KV events. Raises OtherForm."""
        return self._judged(self.batches.take(number, parsed(payload)), now)

    def heard_replayed(self, number: int, payload: bytes) -> Verdict:
        """One that was asked for. Raises OtherForm."""
        return self._judged(self.batches.replayed(number, parsed(payload)), self._told_at)

    def heard_end(self, now: float) -> Verdict:
        """All that was asked for is here."""
        return self._judged(self.batches.end(), now)

    def _judged(self, verdict: Verdict, now: float | None) -> Verdict:
        self._is_by_blocks = True
        if verdict in {Verdict.FOLLOWS, Verdict.REPEATED}:
            self._told_at = now
        if self.batches.clears:
            # What was seen before is gone as well, also what nobody has tokenized.
            self.batches.clears = 0
            self._seen.clear()
        return verdict

    def lost(self) -> None:
        """It did not answer: what it has told is not known any more."""
        self._told.forget()
        self.batches.begin()
        self._told_at = None

    def matched(self, pieces: Sequence[int], now: float) -> float:
        """Length in bytes of the prompt's known beginning."""
        if self._told_at is None or now - self._told_at > _STALE_S:
            count = next((number for number, piece in enumerate(pieces) if piece not in self._seen), len(pieces))
        elif self._is_by_blocks:
            count = self._in_blocks(pieces, now - _TOLD_WITHIN_S)
        else:
            count = self._in_told(pieces, now - _TOLD_WITHIN_S)
        return float(count * PIECE_BYTES)

    def _in_told(self, pieces: Sequence[int], fresh: float) -> int:
        count = 0
        for piece in pieces:
            if piece not in self._told.names and self._seen.get(piece, -1.0) < fresh:
                break
            count += 1
        return count

    def _in_blocks(self, pieces: Sequence[int], fresh: float) -> int:
        """By its blocks. Of a piece that nobody has tokenized, and if some blocks are unknown, what was seen counts."""
        index, count = self.batches.index, 0
        places = self._places.of(index.block_size)
        for number, piece in enumerate(pieces, 1):
            block = places.get(piece)
            if block == NO_BLOCK:
                continue
            if block is None or not index.has(block):
                seen = self._seen.get(piece)
                is_gone = block is not None and index.is_complete
                if seen is None or (is_gone and seen < fresh):
                    break
            count = number
        return count

    @property
    def told(self) -> int:
        """How many pieces it has told of."""
        return len(self._told.names)

    @property
    def blocks(self) -> int:
        """How many blocks it has, by its KV events."""
        return len(self.batches.index)

    def clear(self) -> None:
        """The engine is a new one."""
        self._seen.clear()
        self.lost()
