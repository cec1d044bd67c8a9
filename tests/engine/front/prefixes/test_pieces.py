"""Which beginnings of prompts an engine says it has: those whose blocks can be found, whatever comes and goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.front.prefixes import pieces as module
from pdctl.engine.front.prefixes.anywhere import Anywhere
from pdctl.engine.front.prefixes.feed import Feed
from pdctl.engine.front.prefixes.names import BlockNames
from pdctl.engine.front.prefixes.pieces import PieceIndex
from pdctl.engine.ipc.messages import KvRemoved, KvStored
from pdctl.net.prefixes.beginnings import PIECE_BYTES, Beginning

SIZE = 4


class Numbered(BlockNames):
    """A block's name is its last token. `asked`: how many were computed."""

    def __init__(self) -> None:
        self.asked = 0

    @property
    def block_size(self) -> int:
        return SIZE

    def of(self, token_ids: Sequence[int], count: int, salt: str) -> Iterator[int]:
        for block in range(count):
            self.asked += 1
            yield token_ids[(block + 1) * SIZE - 1]


class Engine:
    def __init__(self) -> None:
        self.names, self.blocks, self.told = Numbered(), Anywhere(), Feed("e")
        self.index = PieceIndex(self.blocks, self.told, self.names)

    def change(self, is_stored: bool, *names: int) -> None:
        found = [name.to_bytes(8, "big") + bytes(24) for name in names]
        changes = [KvStored(found, None, []) if is_stored else KvRemoved(found)]
        self.index.take(self.blocks.pool_changed(changes))

    def note(self, pieces: Sequence[int], tokens: int, first: int = 0) -> None:
        """A prompt of so many bytes as its pieces have."""
        beginning = Beginning(PIECE_BYTES * len(pieces), tuple(pieces))
        self.index.note(beginning, range(first, first + tokens), "")


def test_a_piece_is_there_while_the_block_where_it_ends_is() -> None:
    engine = Engine()
    engine.note([101, 102], tokens=16)  # blocks called 3, 7, 11, 15: the pieces end at 7 and 15
    assert not engine.told.has(101)
    engine.change(True, 3, 7, 11)
    assert (engine.told.has(101), engine.told.has(102)) == (True, False)
    engine.change(True, 15)
    engine.change(False, 7)
    assert (engine.told.has(101), engine.told.has(102)) == (False, True)
    engine.index.audit()


def test_a_piece_of_a_prompt_that_is_there_already_is_told_at_once() -> None:
    engine = Engine()
    engine.change(True, 3, 7, 11, 15)
    engine.note([101, 102], tokens=16)
    assert (engine.told.has(101), engine.told.has(102)) == (True, True)
    engine.names.asked = 0
    engine.note([101, 102], tokens=16)
    assert engine.names.asked == 0, "nothing is computed for what is told"


def test_a_piece_shorter_than_a_block_is_there_with_the_first_block() -> None:
    """With blocks of more than some 60 tokens, that is the first piece of every prompt."""
    engine = Engine()
    engine.note([101, 102, 103, 104, 105], tokens=9)  # 1.8 tokens each
    assert engine.names.asked == 2
    engine.change(True, 3, 7)
    assert [engine.told.has(piece) for piece in range(101, 106)] == [True, True, True, True, True]
    engine.note([101], tokens=3)
    engine.index.audit()


def test_what_is_there_keeps_its_block() -> None:
    """A longer prompt has other tokens for each byte, and would guess another block."""
    engine = Engine()
    engine.note([101], tokens=8)
    engine.change(True, 7)
    engine.note([101, 102], tokens=40)
    assert engine.told.has(101)
    engine.change(False, 7)
    assert not engine.told.has(101)
    engine.note([101, 102], tokens=40)
    engine.change(True, 19)
    assert engine.told.has(101), "what was not there any more was guessed anew"
    engine.index.audit()


STEPS = st.one_of(
    st.tuples(st.just("note"), st.lists(st.integers(100, 112), min_size=1, max_size=5, unique=True),
              st.integers(1, 40), st.integers(0, 8)),
    st.tuples(st.sampled_from(["store", "remove"]), st.lists(st.integers(0, 47), min_size=1, max_size=4)),
)  # fmt: skip


@given(st.lists(STEPS, max_size=40), st.integers(3, 8))
def test_what_is_told_is_what_is_there(steps: list[tuple[object, ...]], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST", most)
        engine = Engine()
        for step in steps:
            match step:
                case ("note", list() as pieces, int() as tokens, int() as first):
                    engine.note(pieces, tokens, first)
                case (how, list() as names):
                    engine.change(how == "store", *names)
            engine.index.audit()
            assert len(engine.index._block_of) <= most
