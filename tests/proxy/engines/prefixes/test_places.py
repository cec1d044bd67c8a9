"""Where pieces of prompts end: learned from tokens, for all engines, and kept while somebody has the block."""

from __future__ import annotations

import pytest

from pdctl.net.prefixes.beginnings import PIECE_BYTES, Beginning
from pdctl.proxy.engines.prefixes import places as module
from pdctl.proxy.engines.prefixes.blocks import names, salt_of
from pdctl.proxy.engines.prefixes.places import NO_BLOCK, Places

SIZE = 4


def beginning(*pieces: int) -> Beginning:
    return Beginning(PIECE_BYTES * len(pieces), pieces)


def chain(tokens: list[int], salt: str = "") -> list[int]:
    return list(names(SIZE, tokens, (salt_of(salt),)))


def anywhere(block: int) -> bool:
    return True


def nowhere(block: int) -> bool:
    return False


def test_a_piece_ends_in_the_block_at_its_part_of_the_tokens() -> None:
    places, tokens = Places(), list(range(16))
    places.note(beginning(1, 2), tokens, "", SIZE, anywhere)
    assert dict(places.of(SIZE)) == {1: chain(tokens)[1], 2: chain(tokens)[3]}
    assert dict(places.of(SIZE + 1)) == {}, "other blocks have other names"
    places.note(beginning(3, 4, 5), list(range(9)), "s", SIZE, anywhere)
    assert [places.of(SIZE)[piece] for piece in (3, 4, 5)] == [NO_BLOCK, *chain(list(range(9)), "s")]
    places.note(beginning(6), tokens, "", 0, anywhere)
    places.audit()


def test_what_is_there_keeps_its_block() -> None:
    places, short, long = Places(), list(range(8)), list(range(40))
    places.note(beginning(1), short, "", SIZE, anywhere)
    places.note(beginning(1, 2), long, "", SIZE, anywhere)
    assert places.of(SIZE)[1] == chain(short)[1]
    places.note(beginning(1, 2), long, "", SIZE, {chain(long)[4], chain(long)[9]}.__contains__)
    assert places.of(SIZE)[1] == chain(long)[4]


def test_tokens_that_nobody_has_computed_are_not_believed() -> None:
    places, tokens = Places(), list(range(16))
    places.note(beginning(1, 2), tokens, "", SIZE, {chain(tokens)[1]}.__contains__)
    assert dict(places.of(SIZE)) == {1: chain(tokens)[1]}
    places.note(beginning(1, 2), tokens, "", SIZE, nowhere)
    assert not places.of(SIZE)


def test_there_is_nothing_to_learn_of_pieces_that_are_known_and_there() -> None:
    places, tokens = Places(), list(range(9))
    assert not places.knows((1, 2, 3), SIZE, nowhere)
    places.note(beginning(1, 2, 3), tokens, "", SIZE, anywhere)
    assert places.knows((1, 2, 3), SIZE, chain(tokens).__contains__), "the first one has no block"
    assert not places.knows((1, 2, 3), SIZE, nowhere)
    assert not places.knows((1, 2, 4), SIZE, chain(tokens).__contains__)


def test_pieces_that_were_used_longest_ago_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_PIECES", 3)
    monkeypatch.setattr(module, "_MOST_SIZES", 2)
    places, tokens = Places(), list(range(16))
    places.note(beginning(1, 2), tokens, "", SIZE, anywhere)
    assert places.knows((1,), SIZE, chain(tokens).__contains__)
    places.note(beginning(3, 4), tokens, "", SIZE, anywhere)
    assert set(places.of(SIZE)) == {1, 3, 4}
    for size in (5, 6):
        places.note(beginning(1), tokens, "", size, anywhere)
    assert not places.of(SIZE)
    places.audit()
