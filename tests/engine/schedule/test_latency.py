"""The latency model of a running engine."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.schedule.latency import LatencyModel
from pdctl.latency import Step, StepTimes, step_of

TRUE = StepTimes((0.004, 2e-4, 3e-8, 1e-4, 5e-7))
PROMPT, DECODES = step_of([(200, 0)]), step_of([(1, 300)] * 4)


def some_step(rng: random.Random) -> Step:
    decodes = [(1, rng.randint(1, 2000)) for _ in range(rng.choice([0, 1, 4, 16]))]
    prompts = [(rng.randint(2, 512), rng.randint(0, 1000))] if not decodes or rng.random() < 0.5 else []
    return step_of([*decodes, *prompts])


def learn(model: LatencyModel, steps: int, seconds: Callable[[Step], float], seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(steps):
        step = some_step(rng)
        model.took(step, seconds(step))


def test_the_first_step_of_a_kind_decides_until_there_are_enough() -> None:
    model = LatencyModel()
    model.took(PROMPT, 1.0)
    assert model.times.seconds(PROMPT) == pytest.approx(1.0)
    model.took(DECODES, 0.1)
    assert model.times.seconds(DECODES) == pytest.approx(0.1)
    assert model.times.seconds(PROMPT) == pytest.approx(1.0)
    assert not model.is_fitted


def test_it_learns_from_the_steps_of_an_engine() -> None:
    model, noise = LatencyModel(), random.Random(3)
    learn(model, 400, lambda step: TRUE.seconds(step) * noise.uniform(0.9, 1.1))
    for kind in model.accuracy.values():
        assert kind.steps > 50
        assert kind.error / kind.steps < 0.12
    rng = random.Random(9)
    for step in [some_step(rng) for _ in range(50)]:
        assert model.times.seconds(step) == pytest.approx(TRUE.seconds(step), rel=0.15)
    # Nine of ten steps take at most `slow` times the prediction.
    assert 1.03 < model.times.slow < 1.15


def test_it_follows_a_machine_that_has_become_slower() -> None:
    model = LatencyModel()
    learn(model, 300, TRUE.seconds)
    learn(model, 600, lambda step: 2 * TRUE.seconds(step), seed=1)
    assert model.times.seconds(PROMPT) == pytest.approx(2 * TRUE.seconds(PROMPT), rel=0.1)
    assert model.times.seconds(DECODES) == pytest.approx(2 * TRUE.seconds(DECODES), rel=0.1)


def test_hours_of_decoding_do_not_change_what_is_known_about_prompts() -> None:
    model = LatencyModel()
    learn(model, 300, TRUE.seconds)
    before = model.times.seconds(PROMPT)
    rng = random.Random(5)
    for _ in range(5000):
        step = step_of([(1, rng.randint(1, 2000)) for _ in range(rng.randint(1, 16))])
        model.took(step, TRUE.seconds(step))
    assert model.times.seconds(PROMPT) == pytest.approx(before, rel=0.05)


def test_a_process_that_stood_still_is_not_learned_from() -> None:
    model = LatencyModel()
    learn(model, 300, TRUE.seconds)
    for _ in range(3):
        model.took(DECODES, 60.0)
    learn(model, 100, TRUE.seconds, seed=2)
    assert model.times.seconds(DECODES) == pytest.approx(TRUE.seconds(DECODES), rel=0.1)


def test_an_engine_that_has_only_decoded_does_not_take_prompts_for_free() -> None:
    model = LatencyModel()
    for _ in range(200):
        model.took(DECODES, 0.1)
    assert model.times.seconds(PROMPT) > 0.05


@given(st.lists(st.tuples(st.lists(st.tuples(st.integers(1, 600), st.integers(0, 4000)), min_size=1, max_size=4),
                          st.floats(1e-6, 100)), max_size=90))  # fmt: skip
def test_whatever_steps_take_predictions_stay_numbers(steps: list[tuple[list[tuple[int, int]], float]]) -> None:
    model = LatencyModel()
    for shape, seconds in steps:
        model.took(step_of(shape), seconds)
    again = LatencyModel(model.measured)
    for found in (model, again):
        for step in (PROMPT, DECODES, step_of([(1, 0)]), step_of([(1, 9), (9, 0)])):
            found.took(step, 0.1)
        assert found.work(512, 0, 512) > 0
        times = found.times
        assert all(math.isfinite(value) for value in (*times.coefficients, *times.corrections, times.slow))


def test_a_fit_to_one_kind_of_step_predicts_the_others() -> None:
    """Prompts whose time is all attention: a decode has none of it."""
    model = LatencyModel()
    for count in range(100, 2000, 50):
        model.took(step_of([(count, 0)]), 1e-6 * count * count)
    assert model.times.seconds(DECODES) < 1e-4
    model.took(DECODES, 0.1)
    assert model.accuracy["decode"].steps == 1


def test_a_new_engine_goes_on_where_an_earlier_one_ended() -> None:
    model = LatencyModel()
    learn(model, 300, TRUE.seconds)
    again = LatencyModel(model.measured)
    assert again.is_fitted
    assert again.times.seconds(PROMPT) == pytest.approx(TRUE.seconds(PROMPT), rel=0.05)
    assert all(kind.steps == 0 for kind in again.accuracy.values())
