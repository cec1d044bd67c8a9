"""Which beginnings of prompts have their KV here, by the names that proxies give them.

A proxy names pieces of a prompt's bytes. The engine knows the prompt's blocks, and guesses in which of them a piece
ends (`Beginning.blocks`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from pdctl.engine.front.prefixes.anywhere import Anywhere
from pdctl.engine.front.prefixes.feed import Feed
from pdctl.engine.front.prefixes.names import BlockNames
from pdctl.net.prefixes.beginnings import Beginning

# Pieces that are known, of all prompts: 16 MiB of them. Those that were asked for longest ago are forgotten.
_MOST = 65_536


class PieceIndex:
    """`told`: what proxies hear. `blocks` must have taken a change before `take` is called with it."""

    def __init__(self, blocks: Anywhere, told: Feed, names: BlockNames) -> None:
        self.told = told
        self._blocks = blocks
        self._names = names
        self._block_of: OrderedDict[int, int] = OrderedDict()
        self._pieces_of: dict[int, set[int]] = {}

    def note(self, beginning: Beginning, token_ids: Sequence[int], salt: str) -> None:
        """A prompt with this beginning is to be computed, or read."""
        wanted = beginning.blocks(len(token_ids), self._names.block_size)
        if self._knows(beginning.pieces) or not wanted or not wanted[-1]:
            return
        names = list(islice(self._names.of(token_ids, wanted[-1], salt), wanted[-1]))
        for piece, count in zip(beginning.pieces, wanted, strict=True):
            # One that ends in the first block is there with it: without it, no later one would count.
            self._put(piece, names[max(count, 1) - 1])
        while len(self._block_of) > _MOST:
            self._forget(next(iter(self._block_of)))

    def take(self, changes: Iterable[tuple[int, bool]]) -> None:
        """Blocks can be found from now on (True), or not any more."""
        for block, is_there in changes:
            found = list(self._pieces_of.get(block, ()))
            if found:
                self.told.note(found, is_there)

    def _knows(self, pieces: Sequence[int]) -> bool:
        """Whether all of them are there. Then nothing is to be computed for them."""
        if not all(self.told.has(piece) for piece in pieces):
            return False
        for piece in pieces:
            self._block_of.move_to_end(piece)
        return True

    def _put(self, piece: int, block: int) -> None:
        """What is there stays: prompts of other lengths guess other blocks."""
        if not self.told.has(piece) and self._block_of.get(piece) != block:
            self._forget(piece)
            self._block_of[piece] = block
            self._pieces_of.setdefault(block, set()).add(piece)
            if self._blocks.has(block):
                self.told.note([piece], is_stored=True)
        self._block_of.move_to_end(piece)

    def _forget(self, piece: int) -> None:
        block = self._block_of.pop(piece, None)
        if block is None:
            return
        pieces = self._pieces_of[block]
        pieces.discard(piece)
        if not pieces:
            del self._pieces_of[block]
        if self.told.has(piece):
            self.told.note([piece], is_stored=False)

    def audit(self) -> None:
        """Check that what is told is what is there."""
        assert len(self._block_of) <= _MOST
        assert sum(map(len, self._pieces_of.values())) == len(self._block_of)
        for piece, block in self._block_of.items():
            assert piece in self._pieces_of[block], "a piece without its block"
            assert self.told.has(piece) == self._blocks.has(block), "what is told is not what is there"
        self.told.audit()
