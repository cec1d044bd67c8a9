"""Guesses by prompt lookup, compared with a search over all tokens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.engine.speculation import drafter, ngram
from pdctl.engine.speculation.ngram import NgramDrafter
from pdctl.speculative import Speculative, format_speculative, parse_speculative


def searched(tokens: list[int], most: int, shortest: int, longest: int) -> list[int]:
    """The same guess by comparing the newest tokens with those before each place."""
    end, best, common = len(tokens), 0, 0
    places = [at for at in range(shortest, end) if tokens[at - shortest : at] == tokens[end - shortest :]]
    for place in places[::-1][: ngram._MOST_PLACES]:
        length = 0
        while length < min(longest, place) and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        if length > common:
            best, common = place, length
    found = list(tokens)
    for offset in range(most if best else 0):
        found.append(found[best + offset])
    return found[end:]


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 3), max_size=60), st.integers(1, 3), st.integers(0, 3), st.integers(0, 8), st.data(),
)  # fmt: skip
def test_a_growing_index_finds_what_a_search_finds(
    tokens: list[int], shortest: int, more: int, most: int, data: st.DataObject
) -> None:
    longest = shortest + more
    index = NgramDrafter(shortest, longest)
    end = 0
    while end < len(tokens):
        end = min(len(tokens), end + data.draw(st.integers(1, 9)))
        assert index.draft(tokens[:end], most) == searched(tokens[:end], most, shortest, longest)


def test_the_place_with_most_in_common_is_taken() -> None:
    tokens = [1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4]
    assert NgramDrafter(2, 4).draft(tokens, 2) == [50, 9], "the older place has four tokens in common"
    assert NgramDrafter(2, 2).draft(tokens, 2) == [60, 1], "of equal ones, the newest is taken"


def test_a_short_cycle_is_continued_beyond_its_end() -> None:
    assert NgramDrafter(2, 4).draft([7, 8, 9, 8, 9], 5) == [8, 9, 8, 9, 8]
    assert NgramDrafter(1, 1).draft([5, 5], 3) == [5, 5, 5]


def test_nothing_is_guessed_of_what_is_new() -> None:
    index = NgramDrafter(2, 4)
    assert index.draft([], 4) == []
    assert index.draft([1], 4) == []
    assert index.draft([1, 2, 3], 4) == []
    assert index.draft([1, 2, 3, 1, 2], 0) == []


def test_a_call_adds_a_bounded_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_MOST_ADDED", 10)
    index = NgramDrafter(2, 4)
    tokens = [1, 2, 3] * 8
    calls = 0
    while not index.draft(tokens, 3):
        calls += 1
        assert len(index._earlier) == 10 * calls
    assert calls == 2
    assert index.draft(tokens, 3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        ('{"kind": "magic"}', "kind must be one of: ngram"),
        ('{"kind": "ngram", "tokens": 0}', "tokens must be from 1"),
        ('{"kind": "ngram", "min_ngram": 5}', "in this order"),
        ('{"kind": "ngram", "max_ngram": 99}', "min_ngram and max_ngram"),
        ('{"kind": "ngram", "draft_model": "x"}', "unknown field"),
        ('{"tokens": 3}', "kind"),
        ("ngram", "JSON"),
    ],
)
def test_wrong_settings_are_errors(word: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        parse_speculative(word)


def test_settings_pass_through_a_command_line() -> None:
    wanted = Speculative("ngram", 7, 1, 9)
    assert parse_speculative(format_speculative(wanted)) == wanted
    assert json.loads(format_speculative(wanted))["tokens"] == 7
    assert parse_speculative(format_speculative(None)) is None
    assert isinstance(drafter(wanted), NgramDrafter)
