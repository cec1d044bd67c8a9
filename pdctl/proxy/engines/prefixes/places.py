"""Where pieces of prompts end in blocks: what a proxy without a tokenizer knows of prompts that engines have tokenized.

One for all engines, because engines of one service tokenize alike; blocks have names that no engine chose. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from pdctl.net.prefixes.beginnings import Beginning
from pdctl.proxy.engines.prefixes.blocks import names, salt_of

# Pieces that are known, of all prompts, for each size of blocks; and sizes.
_MOST_PIECES, _MOST_SIZES = 65_536, 4
# Of a piece that ends in the first block.
NO_BLOCK = -1


class Places:
    """The name of the block where a piece ends, by size of blocks. Pieces that were used longest ago are dropped."""

    def __init__(self) -> None:
        self._by_size: OrderedDict[int, OrderedDict[int, int]] = OrderedDict()

    def of(self, block_size: int) -> Mapping[int, int]:
        """The blocks by piece; NO_BLOCK for pieces that are shorter than one."""
        return self._by_size.get(block_size, _NOTHING)

    def knows(self, pieces: Sequence[int], block_size: int, is_there: Callable[[int], bool]) -> bool:
        """Whether the blocks of all pieces are known and there. Then there is nothing to learn."""
        known = self._by_size.get(block_size, _NOTHING)
        if not all(piece in known and (known[piece] == NO_BLOCK or is_there(known[piece])) for piece in pieces):
            return False
        for piece in pieces:
            known.move_to_end(piece)
        return True

    def note(
        self,
        beginning: Beginning,
        token_ids: Sequence[int],
        salt: str,
        block_size: int,
        is_there: Callable[[int], bool],
    ) -> None:
        """A prompt that was just computed has these tokens. `is_there`: whether a block can be found anywhere.

        What is there stays: prompts of other lengths guess other blocks. A block that is nowhere is not noted: if the
        engine has computed other tokens than it tells, it must not seem to have nothing."""
        if block_size <= 0:
            return
        known, wanted = self._known(block_size), beginning.blocks(len(token_ids), block_size)
        chain = list(islice(names(block_size, token_ids, (salt_of(salt),)), max(wanted, default=0)))
        for piece, count in zip(beginning.pieces, wanted, strict=True):
            before = known.pop(piece, NO_BLOCK)
            found = before if before != NO_BLOCK and is_there(before) else chain[count - 1] if count else NO_BLOCK
            if found == NO_BLOCK or is_there(found):
                known[piece] = found
        while len(known) > _MOST_PIECES:
            known.popitem(last=False)

    def _known(self, block_size: int) -> OrderedDict[int, int]:
        known = self._by_size.setdefault(block_size, OrderedDict())
        self._by_size.move_to_end(block_size)
        while len(self._by_size) > _MOST_SIZES:
            self._by_size.popitem(last=False)
        return known

    def audit(self) -> None:
        """Check the bounds."""
        assert len(self._by_size) <= _MOST_SIZES
        assert all(len(known) <= _MOST_PIECES for known in self._by_size.values())


_NOTHING: OrderedDict[int, int] = OrderedDict()
