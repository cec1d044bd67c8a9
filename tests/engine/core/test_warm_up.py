"""The measurement of an engine without a latency model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.core.warm_up import STEPS_EACH, measured, shapes
from pdctl.engine.executor import Computed
from pdctl.engine.schedule.batch import Limits, Slice
from pdctl.latency import KINDS, StepTimes, step_of

TRUE = StepTimes((0.004, 2e-4, 3e-8, 1e-4, 5e-7))


class Clocked:
    """A device in virtual time, which checks what it is given."""

    def __init__(self, times: StepTimes, limits: Limits, num_blocks: int) -> None:
        self.now = 0.0
        self.steps = 0
        self._times, self._limits, self._blocks = times, limits, num_blocks

    def execute(self, batch: list[Slice]) -> Computed:
        assert sum(piece.count for piece in batch) <= self._limits.max_num_batched_tokens
        assert len(batch) <= self._limits.max_num_seqs
        for piece in batch:
            sequence, end = piece.sequence, piece.start + piece.count
            assert end <= self._limits.max_model_len
            assert len(sequence.token_ids) >= end
            assert len(sequence.block_ids) * self._limits.block_size >= end
            assert all(0 <= block < self._blocks for block in sequence.block_ids)
        self.steps += 1
        self.now += self._times.seconds(step_of((piece.count, piece.start) for piece in batch))
        return [0] * len(batch), [None] * len(batch)


def test_it_finds_the_times_of_an_engine() -> None:
    limits = Limits(16, 512, 2048, 16, frozenset())
    executor = Clocked(TRUE, limits, 1000)
    model = measured(executor.execute, limits, 1000, 100, lambda: executor.now, 60.0)
    assert model.times.coefficients == pytest.approx(TRUE.coefficients, rel=0.05)
    assert {kind for kind, sums in model.measured.items() if sums.weight > STEPS_EACH / 2} == set(KINDS)


def test_a_slow_engine_is_measured_in_bounded_time() -> None:
    limits = Limits(16, 2048, 4096, 16, frozenset())
    slow = StepTimes((0.4, 2e-2, 3e-6, 1e-2, 5e-5))
    executor = Clocked(slow, limits, 1000)
    model = measured(executor.execute, limits, 1000, 100, lambda: executor.now, 4.0)
    assert model.is_fitted or executor.steps < 20
    # At most the time, and two steps of the largest size for each kind.
    assert executor.now < 4.0 + 6 * slow.seconds(step_of([(2048, 2000)]))


@given(st.integers(1, 64), st.integers(1, 600), st.integers(2, 4096), st.integers(1, 40), st.integers(0, 99))
def test_steps_are_ones_that_the_engine_could_get(
    seqs: int, budget: int, longest: int, num_blocks: int, seed: int
) -> None:
    limits = Limits(seqs, max(budget, seqs + 1), longest, 16, frozenset())
    for shape in shapes(limits, num_blocks, random.Random(seed)):
        assert 1 <= len(shape) <= seqs + 1
        assert sum(count for count, _ in shape) <= limits.max_num_batched_tokens + 1
        assert all(count + before <= max(3, min(longest, num_blocks * 16)) for count, before in shape)
