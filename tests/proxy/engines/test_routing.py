from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict, Unpack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.proxy.engines.routing import (
    POLICIES,
    Ask,
    Candidate,
    EnginePair,
    Load,
    Recent,
    RoutingPolicy,
    View,
    candidates,
    choose,
    min_expected_latency,
    min_observed_latency,
    prefix_aware,
    random,
    round_robin,
    slo,
)


class ViewFields(TypedDict, total=False):
    """Fields of a View that most tests leave as they are."""

    kind: str
    prefill_s: Recent
    token_s: Recent
    matched: float
    lost: frozenset[str]
    alone: bool
    pairs: bool


def view(
    name: str, role: str = "prefill", usable: bool = True, load: Load = Load(0, 0), **more: Unpack[ViewFields]
) -> View:
    return View(name, role, "builtin", usable, load, load)._replace(**more)


def ask(size: float = 1.0, number: int = 0, draw: float = 0.0) -> Ask:
    return Ask(size, number, draw, 1.0, 0.1)


ROLES = st.sampled_from(["prefill", "decode", "hybrid"])
POOL = [view("p0"), view("p1"), view("d0", "decode"), view("d1", "decode")]


def chosen(policy: RoutingPolicy, views: list[View], turns: int = 24, size: float = 1.0) -> Counter[EnginePair | None]:
    return Counter(choose(policy, views, ask(size, number, number / turns)) for number in range(turns))


@pytest.mark.parametrize("policy", [round_robin, random])
def test_every_pair_gets_its_part(policy: RoutingPolicy) -> None:
    assert set(chosen(policy, POOL).values()) == {6}


def test_neighbours_in_turn_share_no_engine() -> None:
    first, second = (choose(round_robin, POOL, ask(number=number)) for number in (0, 1))
    assert first is not None
    assert second is not None
    assert first.prefill != second.prefill
    assert first.decode != second.decode


def test_min_expected_latency_prefers_less_work_and_more_speed_in_both_halves() -> None:
    busy, slow = view("p0", load=Load(10, 1)), view("p1", load=Load(2, 1))
    decodes = [view("d0", "decode", load=Load(10, 100)), view("d1", "decode", load=Load(2, 1))]
    assert choose(min_expected_latency, [busy, slow, *decodes], ask()) == EnginePair("p1", "d0")


def test_a_long_decode_does_not_drown_the_prefills_queue() -> None:
    prefills = [view("p0", load=Load(90, 100)), view("p1", load=Load(0, 100))]
    decode = view("d0", "decode", load=Load(20, 0.1))
    assert set(chosen(min_expected_latency, [*prefills, decode])) == {EnginePair("p1", "d0")}


def test_an_unmeasured_engine_is_tried_and_equals_take_turns() -> None:
    views = [view("p0", load=Load(5, 9)), view("p1"), view("d0", "decode")]
    assert choose(min_expected_latency, views, ask()) == EnginePair("p1", "d0")
    assert len(chosen(min_expected_latency, POOL)) == 4


def test_min_observed_latency_explores_judges_and_looks_again() -> None:
    fast = view("d0", "decode", prefill_s=Recent(9, 0.1), token_s=Recent(9, 0.01))
    slow = view("d1", "decode", prefill_s=Recent(9, 0.1), token_s=Recent(9, 0.05))
    new = view("d2", "decode")
    prefill = view("p0", prefill_s=Recent(9, 0.1))
    assert {c.decode for c in chosen(min_observed_latency, [prefill, fast, slow, new]) if c} == {"d2"}
    judged = chosen(min_observed_latency, [prefill, fast, slow], turns=320)
    assert judged[EnginePair("p0", "d0")] > 300
    assert judged[EnginePair("p0", "d1")] > 0, "one that was slow is looked at again"


def test_errors_do_not_count_as_fast() -> None:
    from pdctl.proxy.engines.load import Window

    good, bad = Window(), Window()
    for _ in range(5):
        good.add(0.2)
        bad.failed()
    views = [view("p0", prefill_s=Recent(9, 0.1)), view("d0", "decode", token_s=good.recent()),
             view("d1", "decode", token_s=bad.recent())]  # fmt: skip
    assert choose(min_observed_latency, views, ask(number=1)) == EnginePair("p0", "d0")


def test_prefix_aware_follows_the_prefix_until_load_outweighs_it() -> None:
    decode = view("d0", "decode")
    cold, warm = view("p0", load=Load(0, 100)), view("p1", load=Load(0, 100), matched=900.0)
    assert choose(prefix_aware, [cold, warm, decode], ask(1000)) == EnginePair("p1", "d0")
    swamped = view("p1", load=Load(20_000, 100), matched=900.0)
    assert choose(prefix_aware, [cold, swamped, decode], ask(1000)) == EnginePair("p0", "d0")


def test_slo_takes_the_pair_that_misses_least_inline_or_not() -> None:
    # 100 bytes at 50/s would take 2 s of prefill there: twice the target.
    slow_prefill = view("p0", load=Load(0, 50))
    hybrid = view("h0", "hybrid", load=Load(0, 500), token_s=Recent(5, 0.01))
    assert choose(slo, [slow_prefill, hybrid], ask(100)) == EnginePair("h0", "h0")
    crowded = view("h0", "hybrid", token_s=Recent(5, 0.09))._replace(prompts=Load(400, 500), streams=Load(16, 10))
    idle = view("d0", "decode", load=Load(0, 10), token_s=Recent(5, 0.02))
    quick = view("p1", load=Load(0, 500))
    assert choose(slo, [quick, idle, crowded], ask(100)) == EnginePair("p1", "d0")


def test_hybrids_are_balanced_by_the_prompts_they_have_pending() -> None:
    busy, idle = view("h0", "hybrid", load=Load(2500, 100)), view("h1", "hybrid", load=Load(0, 100))
    assert set(chosen(min_expected_latency, [busy, idle], size=500)) == {EnginePair("h1", "h1")}


def test_the_sick_are_left_out_and_the_avoided_are_a_last_resort() -> None:
    pool = [view("p0"), view("d0", "decode", usable=False), view("d1", "decode")]
    assert choose(round_robin, pool, ask()) == EnginePair("p0", "d1")
    assert choose(round_robin, pool, ask(), frozenset({"d1"})) == EnginePair("p0", "p0"), "prefill finishes it alone"
    assert choose(round_robin, [view("d1", "decode")], ask(), frozenset({"d1"})) == EnginePair("d1", "d1")
    assert choose(round_robin, [view("p", usable=False)], ask()) is None


def test_an_engine_that_answers_nothing_alone_is_only_part_of_pairs() -> None:
    prefill, decode = view("p0", alone=False), view("d0", "decode")
    assert choose(round_robin, [prefill], ask()) is None
    assert choose(round_robin, [prefill, decode], ask()) == EnginePair("p0", "d0")
    deaf = view("d0", "decode", lost=frozenset({"p0"}))
    assert choose(round_robin, [prefill, deaf], ask()) == EnginePair("d0", "d0")
    assert choose(round_robin, [prefill, deaf], ask(), frozenset({"d0"})) == EnginePair("d0", "d0"), "there is no other"


def test_a_hybrid_that_cannot_pair_answers_alone() -> None:
    pool = [view("p0"), view("h0", "hybrid", pairs=False), view("d0", "decode")]
    assert set(chosen(round_robin, pool)) == {EnginePair("p0", "d0"), EnginePair("h0", "h0")}


@pytest.mark.parametrize("policy", [round_robin, min_expected_latency, slo])
def test_many_engines_are_compared_in_parts_and_all_have_their_turn(policy: RoutingPolicy) -> None:
    fleet = [view(f"p{n}") for n in range(40)] + [view(f"d{n}", "decode") for n in range(70)]
    compared: list[int] = []

    def counting(ask: Ask, pairs: Sequence[Candidate]) -> Candidate:
        compared.append(len(pairs))
        return policy(ask, pairs)

    found = chosen(counting, fleet, turns=800)
    assert max(compared) <= 32 * 32
    for names in ({pair.prefill for pair in found if pair}, {pair.decode for pair in found if pair}):
        assert len(names) in (40, 70), "an engine is never used"


def test_of_many_engines_the_one_that_has_the_prompt_is_always_compared() -> None:
    fleet = [view(f"p{n}") for n in range(100)] + [view(f"d{n}", "decode") for n in range(100)]
    fleet[37] = view("p37", matched=500.0)
    assert {pair.prefill for pair in chosen(prefix_aware, fleet, size=500.0) if pair} == {"p37"}


def test_pairs_that_cannot_reach_each_other_are_not_pairs() -> None:
    deaf = view("d0", "decode", lost=frozenset({"p0"}))
    pool = [view("p0"), view("p1"), deaf, view("d1", "decode")]
    assert EnginePair("p0", "d0") not in chosen(round_robin, pool)
    assert len(chosen(round_robin, pool)) == 3
    other = view("d1", "decode", kind="vllm")
    assert set(chosen(round_robin, [view("p0"), view("p1"), deaf, other])) == {EnginePair("p1", "d0")}


def test_hybrids_alone_move_no_kv_and_beside_others_take_both_parts() -> None:
    hybrids = [view("h0", "hybrid"), view("h1", "hybrid")]
    assert all(pair.is_one for pair in candidates(hybrids))
    mixed = {(pair.prefill.name, pair.decode.name) for pair in candidates([view("p0"), view("h0", "hybrid")])}
    assert mixed == {("p0", "h0"), ("h0", "h0")}


@given(st.lists(ROLES, min_size=1, max_size=8))
def test_kv_never_moves_in_a_circle(roles: list[str]) -> None:
    """Engines that are full of KV for each other would wait for each other's blocks."""
    order = {"prefill": 0, "hybrid": 1, "decode": 2}
    fleet = [view(f"e{number}", role) for number, role in enumerate(roles)]
    for pair in candidates(fleet):
        assert pair.is_one or order[pair.prefill.role] < order[pair.decode.role]


@given(
    st.lists(st.tuples(ROLES, st.booleans(), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 9)), max_size=8),
    st.integers(0, 1000), st.floats(0, 1e6), st.sampled_from(sorted(POLICIES)), st.sets(st.integers(0, 7)),
    st.floats(0, 0.999),
)  # fmt: skip
def test_a_choice_is_always_usable_and_fits_its_roles(
    pool: list[tuple[str, bool, float, float, float]],
    number: int,
    size: float,
    policy: str,
    avoid: set[int],
    draw: float,
) -> None:
    views = [
        view(str(n), role, usable, Load(pending, speed), prefill_s=Recent(n, seconds), token_s=Recent(n, seconds),
             matched=pending, lost=frozenset({str(n + 1)}))
        for n, (role, usable, pending, speed, seconds) in enumerate(pool)
    ]  # fmt: skip
    found = choose(POLICIES[policy], views, Ask(size, number, draw, 1.0, 0.1), frozenset(map(str, avoid)))
    by_name = {v.name: v for v in views}
    if found is None:
        assert not any(v.usable for v in views)
        return
    prefill, decode = by_name[found.prefill], by_name[found.decode]
    assert prefill.usable
    assert decode.usable
    if not found.is_one:
        assert prefill.role in ("prefill", "hybrid")
        assert decode.role in ("decode", "hybrid")
        assert prefill.name not in decode.lost


@pytest.mark.parametrize("policy", POLICIES.values())
def test_one_pair_is_the_one(policy: RoutingPolicy) -> None:
    pair = Candidate(view("p0", load=Load(3, 0)), view("d0", "decode"))
    assert policy(ask(5.0, 7, 0.99), [pair]) == pair


def test_engines_with_fixed_roles_never_do_another_role() -> None:
    def fixed(name: str, role: str) -> View:
        return view(name, role)._replace(alone=role == "hybrid", pairs=role != "hybrid")

    p, d, h = fixed("p0", "prefill"), fixed("d0", "decode"), fixed("h0", "hybrid")
    pairs = {(pair.prefill.name, pair.decode.name) for pair in candidates([p, d, h])}
    assert pairs == {("p0", "d0"), ("h0", "h0")}, "a hybrid engine hands nothing over"
    assert not candidates([p]), "a prefill engine cannot compute alone"
    ask = Ask(1.0, 0, 0.0, 1.0, 1.0)
    assert choose(round_robin, [p, d], ask, avoid=frozenset({"p0"})) == EnginePair("p0", "d0"), "there is no other"
    assert choose(round_robin, [p, d, h], ask, alone=True) == EnginePair("h0", "h0")
    assert choose(round_robin, [p], ask) is None
