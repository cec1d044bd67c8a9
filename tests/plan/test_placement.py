"""Places of engines on nodes: what fits, what stays, and how evenly."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.errors import PdctlError
from pdctl.plan.placement import Room, Wish, assign, check_spare, fit

EIGHT = {node: Room(8) for node in "abc"}


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
    after = assign(wishes(3, 6), {"a": Room(8), "c": Room(8)}, before)
    moved = {name for name in after if after[name] != before[name]}
    assert moved == {name for name, node in before.items() if node == "b"}
    assert assign(wishes(3, 6), EIGHT, after) == after


def test_large_engines_are_placed_before_small_ones_fill_the_nodes() -> None:
    mixed = [*wishes(4, 0, gpus=1), Wish("decode-0", "decode", "decode", 4), Wish("decode-1", "decode", "decode", 4)]
    places = assign(mixed, {"a": Room(6), "b": Room(6)}, {})
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
        assign(wishes(0, 3, gpus=4), {"a": Room(4), "b": Room(4)}, {})


def test_room_for_a_lost_node_is_kept_where_asked() -> None:
    assign(wishes(0, 16), EIGHT, {}, spare=1)
    with pytest.raises(PdctlError, match="without a, no node has 1 free GPU for"):
        assign(wishes(0, 17), EIGHT, {}, spare=1)


NODES = st.dictionaries(
    st.sampled_from("abcdef"), st.builds(Room, st.sampled_from([0, 2, 4, 8]), st.sampled_from([4, 64])), min_size=1
)
WISHES = st.lists(
    st.tuples(
        st.sampled_from(["prefill", "decode"]), st.sampled_from([0, 1, 2, 4, 8]), st.sets(st.sampled_from("abc")),
        st.sampled_from([0, 2, 5]),
    ),
    max_size=12,
)


Wanted = tuple[str, int, set[str], int]


def asked_of(wanted: list[Wanted]) -> list[Wish]:
    return [
        Wish(f"e{n}", role, role, count, tuple(sorted(on)), memory=memory)
        for n, (role, count, on, memory) in enumerate(wanted)
    ]


@given(NODES, WISHES, st.dictionaries(st.integers(0, 11), st.sampled_from("abcdefg")))
def test_nothing_is_ever_placed_where_it_may_not_be(
    rooms: dict[str, Room], wanted: list[Wanted], before: dict[int, str]
) -> None:
    asked = asked_of(wanted)
    was = {f"e{number}": node for number, node in before.items()}
    places = fit(asked, rooms, was)
    assert places.nodes.keys() | places.failures.keys() == {wish.name for wish in asked}
    assert not places.nodes.keys() & places.failures.keys()
    gpus: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    for wish in asked:
        if wish.name in places.nodes:
            node = places.nodes[wish.name]
            assert wish.may_run_on(node)
            gpus[node] += wish.gpus
            memory[node] += wish.memory
    assert all(gpus[node] <= rooms[node].gpus and memory[node] <= rooms[node].memory for node in gpus)
    for wish in asked:
        if wish.name in places.failures:
            left = [n for n in rooms if rooms[n].gpus - gpus[n] >= wish.gpus]
            left = [n for n in left if rooms[n].memory - memory[n] >= wish.memory]
            assert not any(map(wish.may_run_on, left)), "it has room"
    if not places.failures:
        assert assign(asked, rooms, places.nodes) == places.nodes


@given(NODES, WISHES)
def test_each_engine_goes_to_the_best_node(rooms: dict[str, Room], wanted: list[Wanted]) -> None:
    """The same places as by looking at every node for every engine."""
    asked = asked_of(wanted)
    gpus = {node: room.gpus for node, room in rooms.items()}
    memory = {node: room.memory for node, room in rooms.items()}
    counts: Counter[tuple[str, str]] = Counter()
    expected: dict[str, str] = {}
    for wish in sorted(asked, key=lambda wish: (-wish.gpus, len(wish.nodes) or len(rooms) + 1)):
        able = [n for n in rooms if wish.may_run_on(n) and gpus[n] >= wish.gpus and memory[n] >= wish.memory]
        if able:
            node = min(able, key=lambda n: (counts[n, wish.role], -gpus[n], counts[n, ""], n))
            expected[wish.name] = node
            gpus[node] -= wish.gpus
            memory[node] -= wish.memory
            counts[node, wish.role] += 1
            counts[node, ""] += 1
    assert fit(asked, rooms, {}).nodes == expected


@given(st.lists(st.sampled_from([1, 2, 4, 8]), max_size=10), st.integers(1, 4))
def test_what_fits_on_equal_nodes_is_placed(sizes: list[int], nodes: int) -> None:
    """Sizes that divide each other, largest first, leave no gap that they could not fill."""
    if sum(sizes) > 8 * nodes:
        return
    asked = [Wish(f"e{n}", "decode", "decode", size) for n, size in enumerate(sizes)]
    assign(asked, {str(n): Room(8) for n in range(nodes)}, {})


def test_what_has_no_room_is_left_out_and_the_rest_is_placed() -> None:
    places = fit(wishes(0, 3, gpus=4), {"a": Room(4), "b": Room(4)}, {"decode-1": "b"})
    assert places.nodes == {"decode-1": "b", "decode-0": "a"}
    assert [*places.failures] == ["decode-2"]


def test_memory_counts_for_engines_on_cpus() -> None:
    wish = Wish("p", "p", "prefill", memory=3 << 30)
    assert assign([wish], {"a": Room(0, 2 << 30), "b": Room(0, 4 << 30)}, {}) == {"p": "b"}
    with pytest.raises(PdctlError, match="no node has 3 GiB of free memory for p; free: a 2 GiB"):
        assign([wish], {"a": Room(0, 2 << 30)}, {})


def test_engines_that_share_gpus_take_free_ones_first() -> None:
    sharing = [Wish(f"s-{n}", "s", "hybrid", 1, shares=True) for n in range(3)]
    places = assign([*sharing, *wishes(1, 0)], {"a": Room(2), "b": Room(1), "c": Room(0)}, {})
    assert Counter(places[wish.name] for wish in sharing) in ({"a": 2, "b": 1}, {"a": 1, "b": 2})
    with pytest.raises(PdctlError, match="no node has 1 free GPU for s-0"):
        assign(sharing, {"c": Room(0)}, {})


def test_a_list_of_many_nodes_is_cut() -> None:
    with pytest.raises(PdctlError, match="n7 0 of 1 and 12 more") as caught:
        assign(wishes(0, 21), {f"n{n}": Room(1) for n in range(20)}, {})
    assert "n8" not in caught.value.message


@given(NODES, WISHES, st.integers(1, 2))
def test_room_for_lost_nodes_is_what_placing_without_them_finds(
    rooms: dict[str, Room], wanted: list[Wanted], spare: int
) -> None:
    asked = asked_of(wanted)
    places = fit(asked, rooms, {})
    if places.failures:
        return
    losses = combinations(rooms, min(spare, len(rooms)))
    rests = [{node: room for node, room in rooms.items() if node not in lost} for lost in losses]
    fits = not any(fit(asked, rest, places.nodes).failures for rest in rests)
    try:
        check_spare(asked, rooms, places.nodes, spare)
    except PdctlError:
        assert not fits
    else:
        assert fits


def in_cells(*sizes: int, gpus: int = 8) -> dict[str, Room]:
    """Cells a, b, c of so many nodes."""
    return {f"{cell}{n}": Room(gpus, cell=cell) for cell, size in zip("abc", sizes, strict=False) for n in range(size)}


def roles_by_cell(places: dict[str, str]) -> Counter[tuple[str, str]]:
    return Counter((node[0], name.split("-")[0]) for name, node in places.items())


def test_each_cell_gets_engines_of_both_roles_in_proportion_to_its_size() -> None:
    assert roles_by_cell(assign(wishes(6, 12), in_cells(4, 2), {})) == {
        ("a", "prefill"): 4, ("a", "decode"): 8, ("b", "prefill"): 2, ("b", "decode"): 4,
    }  # fmt: skip


def test_few_engines_of_a_role_use_few_cells() -> None:
    assert roles_by_cell(assign(wishes(1, 6), in_cells(2, 4, 2), {})) == {("b", "prefill"): 1, ("b", "decode"): 6}
    kept = assign(wishes(1, 6), in_cells(2, 4, 2), {"prefill-0": "c0"})
    assert roles_by_cell(kept) == {("c", "prefill"): 1, ("c", "decode"): 6}
    hybrids = [Wish(f"hybrid-{n}", "hybrid", "hybrid", 1) for n in range(3)]
    assert roles_by_cell(assign(hybrids, in_cells(1, 1, 1), {})).keys() == {(cell, "hybrid") for cell in "abc"}


def test_a_cell_without_one_of_the_roles_is_an_error() -> None:
    with pytest.raises(PdctlError, match=r"cell '.' would have decode engines, but none for prefill"):
        assign(wishes(1, 10), in_cells(1, 1), {})


def test_a_lost_node_s_engines_stay_in_its_cell_while_it_has_room() -> None:
    rooms = in_cells(3, 3, gpus=4)
    before = assign(wishes(6, 12), rooms, {})
    after = assign(wishes(6, 12), {node: room for node, room in rooms.items() if node != "a1"}, before)
    assert roles_by_cell(after).total() == 18
    moved = {name for name in after if after[name] != before[name]}
    assert moved == {name for name, node in before.items() if node == "a1"}
    free = {node: 4 - count for node, count in Counter(before.values()).items()}
    inside = sum(after[name][0] == "a" for name in moved)
    assert inside == min(len(moved), free["a0"] + free["a2"])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 20))
def test_what_fits_in_the_cells_has_both_roles_in_each(sizes: list[int], prefills: int, decodes: int) -> None:
    rooms = in_cells(*sizes)
    try:
        found = roles_by_cell(assign(wishes(prefills, decodes), rooms, {}))
    except PdctlError:
        # One engine of a role cannot serve several cells.
        assert prefills + decodes > 8 * max(sizes)
        return
    assert {cell for cell, role in found if role == "prefill"} == {cell for cell, role in found if role == "decode"}
