"""Notes on an answer: what is written is what is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.proxy.takeover.notes import Facts, Progress, begun, encode_facts, read, tokens

PARTS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(-1, 2**31), max_size=4), st.booleans()), max_size=20)


@given(PARTS)
def test_every_leg_is_read_as_it_was_noted(parts: list[tuple[int, list[int], bool]]) -> None:
    expected, notes = [Progress() for _ in range(3)], b""
    for leg, ids, finished in parts:
        if not expected[leg].begun:
            notes += begun(leg, False, 10 + leg, leg)
            expected[leg].begun, expected[leg].prompt_tokens, expected[leg].cached_tokens = True, 10 + leg, leg
        notes += tokens(leg, False, ids, finished)
        expected[leg].token_ids += ids
        expected[leg].finished |= finished
    facts = Facts("id", 1, -5, legs=3, closes=True)
    found = read(encode_facts(facts), notes)
    assert (found.facts, found.legs) == (facts, expected)


def test_a_single_leg_needs_no_number() -> None:
    notes = begun(0, True, 7, 2) + tokens(0, True, [1, 2], False) + b"3," + tokens(0, True, [], True)
    assert notes == b"P7:2,1,2,3,F,"
    assert read(encode_facts(Facts("id", 1, 2)), notes).legs == [Progress(True, True, 7, 2, [1, 2, 3])]


@pytest.mark.parametrize(
    ("facts", "notes"),
    [(b"{", b""), (b"{}", b""), (b"", b"1"), (b"", b"L1,"), (b"", b"L-1,"), (b"", b"x,"), (b"", b"P1:,")],
)
def test_what_this_version_does_not_write_is_refused(facts: bytes, notes: bytes) -> None:
    with pytest.raises(ValueError, match=r"facts|notes|choice|invalid literal"):
        read(facts or encode_facts(Facts("id", 1, 2)), notes)
