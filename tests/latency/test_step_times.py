"""The model of step times: its features, its closed forms, its fit."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.latency import KINDS, Step, StepTimes, step_of
from pdctl.latency.fit import Sums

TIMES = StepTimes((0.004, 2e-4, 3e-8, 1e-4, 5e-7), (1.1, 0.9, 1.2), 1.3)
SHAPES = st.lists(st.tuples(st.integers(1, 600), st.integers(0, 4000)), min_size=1, max_size=12)


def test_a_step_counts_prompts_and_decodes_apart() -> None:
    step = step_of([(1, 100), (1, 50), (10, 20)])
    assert step == Step(tokens=12, attention=10 * 25, sequences=3, context=150, decodes=2)
    assert step.kind == "mixed"
    assert step_of([(1, 7)]).kind == "decode"
    assert step_of([(2, 0), (5, 9)]).kind == "prefill"
    assert step_of([(1, 100), (1, 50)]).with_prompt(10, 20) == step


@given(
    st.floats(0, 0.1), st.floats(1e-7, 1e-2), st.floats(0, 1e-5), st.integers(1, 3000), st.integers(0, 3000),
    st.integers(1, 700),
)  # fmt: skip
def test_the_chunks_of_a_prompt_add_up(
    per_step: float, per_token: float, attention: float, tokens: int, before: int, budget: int
) -> None:
    times = StepTimes((per_step, per_token, attention, 1e-4, 1e-6), (1.5, 1.0, 1.0))
    chunks = [(min(budget, tokens - start), before + start) for start in range(0, tokens, budget)]
    # A chunk of one token at the end is described as a decode.
    attended = sum(count * (start + count / 2) for count, start in chunks)
    expected = 1.5 * sum((len(chunks) * (per_step + 1e-4), tokens * per_token, attended * attention))
    assert times.prompt_s(tokens, before, budget) == pytest.approx(expected)


@given(SHAPES, st.integers(0, 3000), st.floats(0.001, 2.0))
def test_the_closed_form_is_the_longest_chunk_within_the_limit(
    shape: list[tuple[int, int]], before: int, limit_s: float
) -> None:
    decodes = step_of((1, start) for _, start in shape)
    found = TIMES.chunk(decodes, before, limit_s)

    def slow_s(count: int) -> float:
        mixed = decodes.with_prompt(count, before)
        return StepTimes(TIMES.coefficients, (1.2, 1.2, 1.2)).seconds(mixed) * TIMES.slow

    assert found == 0 or slow_s(found) <= limit_s + 1e-9
    assert slow_s(found + 1) > limit_s - 1e-9


def test_a_model_without_attention_has_a_chunk_too() -> None:
    times = StepTimes((0.0, 1e-3, 0.0, 0.0, 0.0))
    assert times.chunk(step_of([(1, 10)]), 0, 0.101) == 100
    assert StepTimes((0.1, 0.0, 0.0, 0.0, 0.0)).chunk(step_of([(1, 10)]), 0, 0.2) > 10**6


def test_a_fit_finds_the_coefficients() -> None:
    rng = random.Random(1)
    sums = Sums.empty(5)
    for _ in range(200):
        shape = [(1, rng.randint(1, 2000)) for _ in range(rng.randint(0, 12))]
        shape += [(rng.randint(2, 512), rng.randint(0, 2000)) for _ in range(rng.randint(0 if shape else 1, 2))]
        step = step_of(shape)
        sums.add(step.row, StepTimes(TIMES.coefficients).seconds(step))
    assert sums.solve() == pytest.approx(TIMES.coefficients, rel=1e-3)


@given(st.lists(st.tuples(SHAPES, st.floats(1e-4, 10.0)), max_size=30))
def test_coefficients_are_never_negative(steps: list[tuple[list[tuple[int, int]], float]]) -> None:
    parts = [Sums.empty(5), Sums.empty(5)]
    for number, (shape, seconds) in enumerate(steps):
        parts[number % 2].add(step_of(shape).row, seconds)
    found = Sums.together(parts).solve()
    assert len(found) == 5
    assert min(found) >= 0


def test_older_rows_lose_weight() -> None:
    sums = Sums.empty(5)
    for seconds in [1.0] * 50 + [3.0] * 300:
        sums.add(step_of([(100, 0)]).row, seconds, keep=0.95)
    assert StepTimes(tuple(sums.solve())).seconds(step_of([(100, 0)])) == pytest.approx(3.0, rel=0.01)  # type: ignore[arg-type]
    assert sums.weight == pytest.approx(20.0, rel=0.01)


def test_every_kind_has_its_correction() -> None:
    steps = [step_of([(100, 0)]), step_of([(1, 99)]), step_of([(1, 99), (10, 0)])]
    assert [step.kind for step in steps] == list(KINDS)
    plain = StepTimes(TIMES.coefficients)
    assert [TIMES.seconds(step) / plain.seconds(step) for step in steps] == pytest.approx([1.1, 0.9, 1.2])
