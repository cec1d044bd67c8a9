"""The beginnings of prompts that an engine has KV of, as far as it tells, or as this proxy has seen. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pdctl.net.beginnings import PIECE_BYTES
from pdctl.net.told import Told
from pdctl.wire import BlocksCall, BlocksReply

_MOST_PIECES = 65536
# An answered prompt counts for so long at an engine that tells what it has: by then it has told of it.
_TOLD_WITHIN_S = 1.0
# An engine with nothing to tell answers after the first time; after the second, what it told before counts no more.
WAIT_S, _STALE_S = 10.0, 25.0


class KnownPrefixes:
    """What is known of one engine. Without its word, the newest prompts that it has computed; times are monotonic."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, float] = OrderedDict()
        self._told = Told()
        self._told_at: float | None = None

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
        follows = self._told.heard(reply)
        self._told_at = now if follows else None
        return follows

    def lost(self) -> None:
        """It did not answer: what it has told is not known any more."""
        self._told.forget()
        self._told_at = None

    def matched(self, pieces: Sequence[int], now: float) -> float:
        """Length in bytes of the prompt's known beginning."""
        if self._told_at is None or now - self._told_at > _STALE_S:
            count = next((number for number, piece in enumerate(pieces) if piece not in self._seen), len(pieces))
        else:
            fresh = now - _TOLD_WITHIN_S
            count = 0
            for piece in pieces:
                if piece not in self._told.names and self._seen.get(piece, -1.0) < fresh:
                    break
                count += 1
        return float(count * PIECE_BYTES)

    @property
    def told(self) -> int:
        """How many pieces it has told of."""
        return len(self._told.names)

    def clear(self) -> None:
        """The engine is a new one."""
        self._seen.clear()
        self.lost()
