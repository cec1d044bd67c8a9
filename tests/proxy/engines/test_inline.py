"""Where a prompt is computed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdctl.latency import StepTimes, Work
from pdctl.proxy.engines.inline import Prospect, inline_s, is_better, remote_s

# A decode step takes 12 ms, a prompt of 500 tokens 110 ms.
TIMES = StepTimes((0.01, 2e-4, 3e-8, 1e-3, 5e-7))
WORK = Work(TIMES, 512, decodes=4, context=1200)
TPOT_S = 0.1


def engine(prompt_tokens: float = 0.0, decodes: float = 0.0, cached: float = 0.0, work: Work = WORK) -> Prospect:
    return Prospect(work, prompt_tokens, decodes, cached)


def why(prefill: Prospect, decode: Prospect, tokens: float, tpot_s: float = TPOT_S) -> str:
    found = is_better(prefill, decode, decode, tokens, tpot_s)
    return found[1] if found else "remote"


def test_idle_engines_divide_the_work() -> None:
    # The hand-over of a short prompt takes longer than what it saves.
    assert why(engine(), engine(), 10) == "short"
    assert why(engine(), engine(), 1000) == "remote"


def test_a_slow_hand_over_keeps_longer_prompts_inline() -> None:
    slow = engine()._replace(hand_over_s=0.1)
    assert why(engine(), engine(), 300) == "remote"
    assert is_better(engine(), slow, slow, 300, TPOT_S)


def test_a_busy_prefill_engine_is_avoided() -> None:
    assert why(engine(prompt_tokens=3000), engine(), 1000) == "prefill_busy"
    # But not by going where even more waits.
    assert why(engine(prompt_tokens=3000), engine(prompt_tokens=4000), 1000) == "remote"


def test_beside_many_decodes_a_prompt_takes_its_time() -> None:
    # With 60 sequences a step takes 75 ms, which leaves time for 100 tokens.
    assert why(engine(prompt_tokens=600), engine(decodes=60), 1000) == "remote"
    assert why(engine(prompt_tokens=20_000), engine(decodes=60), 1000) == "prefill_busy"


def test_sequences_that_miss_their_target_are_left_alone() -> None:
    assert inline_s(engine(decodes=200), 10, TPOT_S) is None
    assert inline_s(engine(decodes=200), 10, 0.0) is not None
    assert why(engine(prompt_tokens=100_000), engine(decodes=200), 10) == "remote"


def test_a_prompt_goes_where_its_beginning_is() -> None:
    assert why(engine(), engine(cached=990), 1000) == "cached"
    assert why(engine(cached=990), engine(cached=990), 1000) == "short"
    assert why(engine(cached=990), engine(), 1000) == "remote"


@given(
    st.floats(1, 20_000), st.floats(0, 1e5), st.floats(0, 1e5), st.floats(0, 500), st.floats(0.001, 2),
    st.floats(0, 20_000),
)  # fmt: skip
def test_predictions_are_positive_and_grow_with_the_work(
    tokens: float, before: float, more: float, decodes: float, tpot_s: float, cached: float
) -> None:
    less, busy = engine(before, decodes, cached), engine(before + more, decodes, cached)
    assert 0 < remote_s(less, less, tokens) <= remote_s(busy, less, tokens) + 1e-9
    one, other = inline_s(less, tokens, tpot_s), inline_s(busy, tokens, tpot_s)
    if one is None:
        assert other is None
    else:
        assert other is not None
        assert 0 < one <= other + 1e-9


def test_an_engine_that_reports_no_decodes_yet_is_predicted_without_context() -> None:
    new = engine(decodes=3, work=Work(TIMES, 512))
    assert inline_s(new, 100, TPOT_S) is not None
