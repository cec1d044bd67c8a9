"""Places of engines on nodes: what fits, what stays, and how evenly."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.errors import PdctlError
from pdctl.plan.placement import Wish, assign

EIGHT = {"a": 8, "b": 8, "c": 8}


def wishes(prefills: int, decodes: int, gpus: int = 1) -> list[Wish]:
    found = [Wish(f"prefill-{n}", "prefill", "prefill", gpus) for n in range(prefills)]
    return found + [Wish(f"decode-{n}", "decode", "decode", gpus) for n in range(decodes)]


def test_each_node_gets_engines_of_both_roles() -> None:
    places = assign(wishes(3, 6), EIGHT, {})
    assert Counter((name.split("-")[0], node) for name, node in places.items()) == {
        **{("prefill", node): 1 for node in EIGHT},
        **{("decode", node): 2 for node in EIGHT},
    }


def test_engines_stay_and_only_those_of_a_lost_node_move() -> None:
    before = assign(wishes(3, 6), EIGHT, {})
    after = assign(wishes(3, 6), {"a": 8, "c": 8}, before)
    moved = {name for name in after if after[name] != before[name]}
    assert moved == {name for name, node in before.items() if node == "b"}
    assert assign(wishes(3, 6), EIGHT, after) == after


def test_large_engines_are_placed_before_small_ones_fill_the_nodes() -> None:
    mixed = [*wishes(4, 0, gpus=1), Wish("decode-0", "decode", "decode", 4), Wish("decode-1", "decode", "decode", 4)]
    places = assign(mixed, {"a": 6, "b": 6}, {})
    assert {places["decode-0"], places["decode-1"]} == {"a", "b"}


def test_named_nodes_are_obeyed_and_an_unknown_one_is_an_error() -> None:
    [wish] = wishes(1, 0)
    assert assign([Wish("p", "p", "prefill", 1, ("c",))], EIGHT, {"p": "a"}) == {"p": "c"}
    with pytest.raises(PdctlError, match="may run on d, but no such node is there \\(known: a, b, c\\)"):
        assign([Wish("p", "p", "prefill", 1, ("d",))], EIGHT, {})
    with pytest.raises(PdctlError, match="no such node is there \\(known: none\\)"):
        assign([wish], {}, {})


def test_too_few_gpus_are_an_error_that_tells_what_is_free() -> None:
    with pytest.raises(PdctlError, match="no node has 4 free GPUs for decode-2; free: a 0 of 4, b 0 of 4"):
        assign(wishes(0, 3, gpus=4), {"a": 4, "b": 4}, {})


def test_room_for_a_lost_node_is_kept_where_asked() -> None:
    assign(wishes(0, 16), EIGHT, {}, spare=1)
    with pytest.raises(PdctlError, match="without a, no node has 1 free GPU for"):
        assign(wishes(0, 17), EIGHT, {}, spare=1)


NODES = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([0, 2, 4, 8]), min_size=1)
WISHES = st.lists(
    st.tuples(
        st.sampled_from(["prefill", "decode"]), st.sampled_from([0, 1, 2, 4, 8]), st.sets(st.sampled_from("abc"))
    ),
    max_size=12,
)


@given(NODES, WISHES, st.dictionaries(st.integers(0, 11), st.sampled_from("abcdefg")))
def test_nothing_is_ever_placed_where_it_may_not_be(
    gpus: dict[str, int], wanted: list[tuple[str, int, set[str]]], before: dict[int, str]
) -> None:
    asked = [Wish(f"e{n}", role, role, count, tuple(sorted(on))) for n, (role, count, on) in enumerate(wanted)]
    was = {f"e{number}": node for number, node in before.items()}
    try:
        places = assign(asked, gpus, was)
    except PdctlError:
        return
    assert places.keys() == {wish.name for wish in asked}
    used: Counter[str] = Counter()
    for wish in asked:
        assert wish.may_run_on(places[wish.name])
        used[places[wish.name]] += wish.gpus
    assert all(used[node] <= gpus[node] for node in used)
    assert assign(asked, gpus, places) == places


@given(st.lists(st.sampled_from([1, 2, 4, 8]), max_size=10), st.integers(1, 4))
def test_what_fits_on_equal_nodes_is_placed(sizes: list[int], nodes: int) -> None:
    """Sizes that divide each other, largest first, leave no gap that they could not fill."""
    if sum(sizes) > 8 * nodes:
        return
    asked = [Wish(f"e{n}", "decode", "decode", size) for n, size in enumerate(sizes)]
    assign(asked, {str(n): 8 for n in range(nodes)}, {})
