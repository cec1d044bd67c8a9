"""When engines change their roles, and when they do not."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdctl.elastic import EngineView, RoleName, Rules
from pdctl.elastic.controller import Memory, decide, pressure_of
from pdctl.latency import StepTimes, Work

# 1,000 tokens of a prompt take a second; a decode step 20 ms, and 1 ms for each sequence.
TIMES = StepTimes((0.02, 1e-3, 0.0, 0.0, 0.0))
RULES = Rules(ttft_s=2.0, tpot_s=0.1)


def engine(name: str, role: RoleName, prompt_tokens: int = 0, decodes: int = 0, kv_used: float = 0.0) -> EngineView:
    return EngineView(name, role, Work(TIMES, 512, prompt_tokens, decodes, 100 * decodes), 400, kv_used)


def look(memory: Memory, engines: list[EngineView], times: int = 1, now: float = 100.0) -> tuple[Memory, list[str]]:
    """Look several times, two seconds apart; returns what was changed."""
    changes = []
    for number in range(times):
        memory, found = decide(memory, engines, RULES, now + 2 * number)
        memory.audit()
        if found.engine:
            changes.append(f"{found.engine} {found.role}")
            engines = [replace(e, role=found.role) if e.name == found.engine else e for e in engines]
    return memory, changes


PROMPTS = [engine("p", "prefill", 20_000), engine("d", "decode", decodes=2), engine("e", "decode", decodes=1)]
ANSWERS = [engine("p", "prefill"), engine("q", "prefill", 100), engine("d", "decode", decodes=200)]


def test_a_queue_of_prompts_gets_the_decode_engine_with_the_fewest_answers() -> None:
    assert look(Memory(), PROMPTS, 2)[1] == [], "two looks could be noise"
    assert look(Memory(), PROMPTS, 3)[1] == ["e prefill"]


def test_slow_answers_get_the_prefill_engine_with_the_shortest_queue() -> None:
    assert look(Memory(), ANSWERS, 3)[1] == ["p decode"]


def test_full_kv_counts_as_slow_answers() -> None:
    engines = [engine("p", "prefill"), engine("q", "prefill"), engine("d", "decode", decodes=1, kv_used=0.99)]
    assert look(Memory(), engines, 3)[1] == ["p decode"]


def test_full_seats_count_as_slow_answers() -> None:
    engines = [replace(one, seats=16) for one in (*PROMPTS[:1], engine("q", "prefill"), engine("d", "decode", 0, 16))]
    engines[0] = replace(engines[0], work=Work(TIMES, 512))
    assert look(Memory(), engines, 3)[1] == ["p decode"]


def test_the_decision_has_the_pressures_before_and_after() -> None:
    memory = Memory()
    for number in range(3):
        memory, found = decide(memory, PROMPTS, RULES, 2.0 * number)
    assert found.now.prefill > 10 > 6 > found.then.prefill
    assert found.now.decode < found.then.decode < 0.6


def test_where_both_are_overloaded_nothing_changes() -> None:
    engines = [engine("p", "prefill", 50_000), engine("d", "decode", decodes=300), engine("e", "decode", decodes=300)]
    memory, found = decide(Memory(), engines, RULES, 0.0)
    assert (found.engine, found.why) == ("", "both sides are loaded: no role helps")
    assert look(memory, engines, 20)[1] == []


def test_the_last_engine_of_a_side_becomes_a_hybrid_at_most() -> None:
    engines = [engine("p", "prefill", 50_000), engine("d", "decode", decodes=1)]
    assert look(Memory(), engines, 20)[1] == ["d hybrid"]
    both = [engine("p", "prefill", 50_000), engine("d", "hybrid", decodes=1)]
    assert look(Memory(), both, 20)[1] == []
    _, found = decide(Memory(("prefill", 5)), both, RULES, 0.0)
    assert found.why == "decode keeps at least 1 of its engines"


def test_a_side_that_would_miss_its_target_then_keeps_its_engine_which_helps_as_a_hybrid() -> None:
    # 40 answers take 60 ms; with one engine less, 100.
    engines = [engine("p", "prefill", 50_000), engine("d", "decode", decodes=38), engine("e", "decode", decodes=38)]
    _, found = decide(Memory(("prefill", 5)), engines, RULES, 0.0)
    assert (found.engine, found.role) == ("d", "hybrid")
    assert found.then.decode == found.now.decode
    assert found.then.prefill < found.now.prefill


def test_decode_gets_a_hybrid_where_prefill_needs_all_its_engines() -> None:
    # Two seconds of prompts: half of the target with two engines, all of it with one.
    engines = [engine("p", "prefill", 2_000), engine("d", "decode", decodes=90)]
    _, found = decide(Memory(("decode", 5)), [*engines, engine("q", "prefill", 0)], RULES, 0.0)
    assert (found.engine, found.role) == ("q", "hybrid")


def test_a_hybrid_full_of_answers_has_little_time_for_prompts() -> None:
    def prefill(decodes: int) -> float:
        return pressure_of([engine("h", "hybrid", 1_000, decodes)], RULES).prefill

    assert prefill(0) < prefill(30) < prefill(60)
    inline = [engine("p", "prefill", 2_000), engine("d", "decode")]
    assert pressure_of([inline[0], replace(inline[1], inline=True)], RULES).prefill < pressure_of(inline, RULES).prefill


def test_one_change_at_a_time() -> None:
    engines = [*PROMPTS[:2], replace(PROMPTS[2], is_settled=False)]
    assert look(Memory(), engines, 20)[1] == []


def test_an_engine_rests_after_a_change() -> None:
    memory, changes = look(Memory(), PROMPTS, 3)
    assert changes == ["e prefill"]
    back = [engine("p", "prefill"), engine("e", "prefill"), engine("d", "decode", decodes=200)]
    assert look(memory, back, 5, now=106.0)[1] == ["p decode"], "e has changed only seconds ago"


def test_changes_that_undo_each_other_freeze_the_roles() -> None:
    memory, now, changes = Memory(), 0.0, 0
    busy = [engine("p", "prefill", 20_000), engine("d", "decode", decodes=1), engine("e", "decode", decodes=1)]
    idle = [engine("p", "prefill"), engine("d", "decode", decodes=100), engine("e", "prefill")]
    roles = {"e": "decode"}
    for half in range(20):
        for _ in range(20):
            engines = [replace(one, role=roles.get(one.name, one.role)) for one in (busy if half % 2 == 0 else idle)]  # type: ignore[arg-type]
            memory, found = decide(memory, engines, RULES, now)
            if found.engine:
                roles[found.engine] = found.role
                changes += 1
            now += 2.0
    assert changes <= 4 + 4 * (now // 600)


@given(st.lists(st.tuples(st.floats(0, 1.0), st.floats(0, 0.55)), max_size=60))
def test_noise_below_the_target_changes_nothing(loads: list[tuple[float, float]]) -> None:
    memory = Memory()
    for number, (prefill, decode) in enumerate(loads):
        engines = [
            engine("p", "prefill", int(1900 * prefill)), engine("d", "decode", decodes=int(100 * decode)),
            engine("e", "decode", decodes=int(100 * decode)),
        ]  # fmt: skip
        memory, found = decide(memory, engines, RULES, 2.0 * number)
        assert not found.engine


_ROLES = st.sampled_from(["prefill", "decode", "hybrid"])
_ENGINES = st.lists(
    st.tuples(_ROLES, st.integers(0, 60_000), st.integers(0, 400), st.floats(0, 1)), min_size=1, max_size=6
)


@given(st.lists(_ENGINES, min_size=1, max_size=30), st.integers(1, 3), st.integers(1, 3))
def test_no_side_goes_below_its_least(looks: list[list[tuple[RoleName, int, int, float]]], p: int, d: int) -> None:
    memory, rules = Memory(), replace(RULES, min_prefill=p, min_decode=d, cooldown_s=0.0)
    for number, loads in enumerate(looks):
        engines = [engine(f"e{at}", *load) for at, load in enumerate(loads)]
        memory, found = decide(memory, engines, rules, 2.0 * number)
        memory.audit()
        after = [replace(one, role=found.role) if one.name == found.engine else one for one in engines]
        for side, least in (("prefill", p), ("decode", d)):
            before = sum(one.role in (side, "hybrid") for one in engines)
            assert sum(one.role in (side, "hybrid") for one in after) >= min(before, least)


@given(_ENGINES)
def test_pressures_are_finite(loads: list[tuple[RoleName, int, int, float]]) -> None:
    found = pressure_of([engine(f"e{at}", *load) for at, load in enumerate(loads)], RULES)
    assert 0 <= found.prefill < 1e10
    assert 0 <= found.decode < 1e10
