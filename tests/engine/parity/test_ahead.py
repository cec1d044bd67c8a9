"""Steps launched while one computes, with a model: loads in which sequences end at any time, and planted faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from pdctl.engine.executor.launches import Launches
from pdctl.engine.model.inputs import InputBuffers, Inputs, Staged
from pdctl.engine.model.runner import ModelRunner, Prepared, Sampled
from pdctl.engine.schedule.batch import Slice
from tests.engine.parity import engines, mixes
from tests.engine.parity.families import Family, build
from tests.engine.schedule.test_ahead import extra_token_sent, freed_a_step_early


@pytest.fixture(scope="module")
def family() -> Family:
    return build("gemma3_text")


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """All engines launch steps ahead."""
    monkeypatch.setattr(
        mixes, "random_setting",
        lambda chance: replace(engines.random_setting(chance), ahead=True, speculative=None, preempt_every=0, seqs=4),
    )  # fmt: skip


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is computed when its results are asked for: after everything that must not happen before."""
    monkeypatch.setattr(Launches, "_run", lambda self, work: cache(work))


@pytest.mark.parametrize("seed", range(6))
def test_a_load_equals_generate(family: Family, seed: int) -> None:
    """In a thread: whatever happens meanwhile."""
    assert mixes.check(family, seed).launched_ahead > 5


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("seed", range(6, 9))
def test_a_late_step_computes_the_same(family: Family, seed: int) -> None:
    assert mixes.check(family, seed).launched_ahead > 5


def _tokens_of_the_step_before(patch: pytest.MonkeyPatch) -> None:
    """A step ahead takes the tokens of one step too early."""

    def start(self: ModelRunner, prepared: Prepared, before: Sampled | None = None) -> Sampled:
        stale = before if before is None else older.get(id(before), before)
        found = whole(self, prepared, stale)
        kept.append(found)
        if before is not None:
            older[id(found)] = before
        return found

    older: dict[int, Sampled] = {}
    kept: list[Sampled] = []
    whole = ModelRunner.start
    patch.setattr(ModelRunner, "start", start)


def _rows_mixed_up(patch: pytest.MonkeyPatch) -> None:
    """A sequence gets the token of its neighbour."""

    def upload(self: InputBuffers, staged: Staged, sampled: torch.Tensor | None = None) -> Inputs:
        return whole(self, staged, None if sampled is None else sampled.roll(1))

    whole = InputBuffers.upload
    patch.setattr(InputBuffers, "upload", upload)


def _one_buffer(patch: pytest.MonkeyPatch) -> None:
    """A step is prepared where the inputs of the running one are."""

    def initialize(self: InputBuffers, *args: object, **options: object) -> None:
        whole(self, *args, **options)  # type: ignore[arg-type]
        self._buffers = (self._buffers[0], self._buffers[0])

    whole = InputBuffers.__init__
    patch.setattr(InputBuffers, "__init__", initialize)


def _draws_of_the_step_before(patch: pytest.MonkeyPatch) -> None:
    """The position of a seeded draw is that of the newest known token."""

    def prepare(self: ModelRunner, batch: list[Slice], before: list[Slice] | None = None) -> Prepared:
        found = whole(self, batch, before)
        known = [(piece.sequence.sampling, len(piece.sequence.token_ids)) for piece in batch]
        return found._replace(requests=known)

    whole = ModelRunner.prepare
    patch.setattr(ModelRunner, "prepare", prepare)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    "fault",
    [
        freed_a_step_early, extra_token_sent, _tokens_of_the_step_before, _rows_mixed_up, _one_buffer,
        _draws_of_the_step_before,
    ],
    ids=lambda fault: fault.__name__.strip("_"),
)  # fmt: skip
def test_a_fault_is_found(
    family: Family, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(8):
            mixes.check(family, seed)
