"""Names of the beginnings of prompts: the same for the same bytes of the same client, and only then."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.net.prefixes.beginnings import MOST_PIECES, PIECE_BYTES, Beginning, beginning_of, from_header, to_header

PROMPT = bytes(range(256)) * 5


def test_prompts_that_begin_alike_have_the_same_first_names() -> None:
    whole, other = beginning_of(PROMPT), beginning_of(PROMPT[:700] + b"x" * 900)
    assert len(whole.pieces) == 5
    assert whole.pieces[:2] == other.pieces[:2]
    assert whole.pieces[2] != other.pieces[2]
    assert len(set(whole.pieces)) == 5, "each piece is named by all before it, too"
    assert beginning_of(b"x" + PROMPT).pieces[0] != whole.pieces[0]
    assert beginning_of(b"short").pieces == ()


def test_names_of_different_salts_have_nothing_in_common() -> None:
    salts = (b"", b"a", b"b", b"ab")
    assert len({name for salt in salts for name in beginning_of(PROMPT, salt).pieces}) == 5 * len(salts)
    # A salt is no part of the prompt.
    assert beginning_of(PROMPT[1:], PROMPT[:1]).pieces[0] != beginning_of(PROMPT).pieces[0]


def test_pieces_end_at_their_part_of_the_prompt() -> None:
    found = beginning_of(PROMPT + b"x" * 100)
    assert found.blocks(1380, 1) == [256, 512, 768, 1024, 1280], "a token for each byte"
    assert found.blocks(345, 16) == [4, 8, 12, 16, 20], "64 tokens each, in blocks of 16"
    assert found.blocks(60, 16) == [0, 1, 2, 2, 3], "the first one ends in the first block"
    assert found.blocks(0, 16) == [0] * 5
    assert len(beginning_of(b"x" * 10**6).pieces) == MOST_PIECES


@given(st.binary(min_size=PIECE_BYTES, max_size=5000), st.binary(max_size=20))
def test_a_header_carries_them(prompt: bytes, salt: bytes) -> None:
    found = beginning_of(prompt, salt)
    assert from_header(to_header(found).decode()) == found


@pytest.mark.parametrize(
    "value",
    [
        "", ":", "x", "512", "512:", "512:00", "512:zz", "-1:" + "00" * 8, "1:" + "00" * 8, "255:" + "00" * 8,
        "511:" + "00" * 16, "9" * 400 + ":" + "00" * 8, "99999:" + "00" * 8 * (MOST_PIECES + 1), "\u0665:" + "00" * 8,
    ],
)  # fmt: skip
def test_other_values_are_no_beginnings(value: str) -> None:
    assert from_header(value) is None


def test_the_shortest_one() -> None:
    assert from_header("256:" + "00" * 7 + "05") == Beginning(256, (5,))
