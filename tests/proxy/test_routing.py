from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.proxy.routing import POLICIES, Choice, Load, Policy, View, choose, min_expected_latency, round_robin


def view(name: str, role: str = "prefill", healthy: bool = True, load: Load = Load(0, 0)) -> View:
    return View(name, role, healthy, load, load)


ROLES = st.sampled_from(["prefill", "decode", "hybrid"])
POOL = [view("p0"), view("p1"), view("d0", "decode"), view("d1", "decode")]


def test_round_robin_visits_every_pair_member() -> None:
    seen = Counter(choose(round_robin, POOL, 1, turn) for turn in range(8))
    assert {c.prefill for c in seen if c} == {"p0", "p1"}
    assert {c.decode for c in seen if c} == {"d0", "d1"}


def test_min_expected_latency_prefers_less_work_and_more_speed() -> None:
    assert min_expected_latency([Load(10, 1), Load(2, 1)], 1, 0) == 1
    assert min_expected_latency([Load(10, 100), Load(2, 1)], 1, 0) == 0


def test_an_unmeasured_engine_is_tried() -> None:
    assert min_expected_latency([Load(5, 9), Load(0, 0)], 1, 0) == 1


def test_equals_take_turns() -> None:
    assert {min_expected_latency([Load(0, 0), Load(0, 0)], 1, turn) for turn in range(4)} == {0, 1}


def test_hybrids_are_balanced_by_the_prompts_they_have_pending() -> None:
    busy, idle = view("h0", "hybrid", load=Load(2500, 100)), view("h1", "hybrid", load=Load(0, 100))
    assert all(choose(min_expected_latency, [busy, idle], 500, turn) == Choice("h1", "h1") for turn in range(4))


def test_the_sick_are_left_out_and_the_avoided_are_a_last_resort() -> None:
    pool = [view("p0"), view("d0", "decode", healthy=False), view("d1", "decode")]
    assert choose(round_robin, pool, 1, 0) == Choice("p0", "d1")
    assert choose(round_robin, pool, 1, 0, frozenset({"d1"})) == Choice("p0", "p0"), "prefill finishes it alone"
    assert choose(round_robin, [view("d1", "decode")], 1, 0, frozenset({"d1"})) == Choice("d1", "d1")
    assert choose(round_robin, [view("p", healthy=False)], 1, 0) is None


def test_hybrids_alone_move_no_kv_and_beside_others_take_both_parts() -> None:
    hybrids = [view("h0", "hybrid"), view("h1", "hybrid")]
    assert all((c := choose(round_robin, hybrids, 1, turn)) and c.is_one for turn in range(4))
    mixed = [view("p0"), view("h0", "hybrid")]
    assert {c for turn in range(4) if (c := choose(round_robin, mixed, 1, turn))} <= {
        Choice("p0", "h0"),
        Choice("h0", "h0"),
    }


@given(
    st.lists(st.tuples(ROLES, st.booleans(), st.floats(0, 1e6), st.floats(0, 1e6)), max_size=8),
    st.integers(0, 1000), st.floats(0, 1e6), st.sampled_from(sorted(POLICIES)), st.sets(st.integers(0, 7)),
)  # fmt: skip
def test_a_choice_is_always_healthy_and_fits_its_roles(
    pool: list[tuple[str, bool, float, float]], turn: int, amount: float, policy: str, avoid: set[int]
) -> None:
    views = [
        view(str(n), role, healthy, Load(pending, speed)) for n, (role, healthy, pending, speed) in enumerate(pool)
    ]
    found = choose(POLICIES[policy], views, amount, turn, frozenset(map(str, avoid)))
    by_name = {v.name: v for v in views}
    if found is None:
        assert not any(v.healthy for v in views)
        return
    prefill, decode = by_name[found.prefill], by_name[found.decode]
    assert prefill.healthy
    assert decode.healthy
    if not found.is_one:
        assert prefill.role in ("prefill", "hybrid")
        assert decode.role in ("decode", "hybrid")


@pytest.mark.parametrize("policy", POLICIES.values())
def test_one_candidate_is_the_one(policy: Policy) -> None:
    assert policy([Load(3, 0)], 5.0, 7) == 0
