from __future__ import annotations

import pytest

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence
from pdctl.engine.schedule.speed import PrefillSpeed


def pieces(*counts: int) -> list[Slice]:
    sequences = [Sequence(str(number), [1] * count, count, Sampling(1)) for number, count in enumerate(counts)]
    return [Slice(sequence, 0, count, True) for sequence, count in zip(sequences, counts, strict=True)]


def test_the_first_step_decides_and_later_ones_move_it() -> None:
    speed = PrefillSpeed()
    speed.note(pieces(100), 0.5)
    assert speed.work(200, 0) == pytest.approx(1.0)
    speed.note(pieces(100), 1.5)
    assert speed.work(200, 0) == pytest.approx(1.2)


def test_a_step_of_decodes_says_nothing() -> None:
    speed = PrefillSpeed()
    before = speed.work(100, 0)
    speed.note(pieces(1, 1, 1), 9.0)
    speed.note(pieces(1, 1, 1, 3), 9.0)
    assert speed.work(100, 0) == before


def test_decodes_beside_a_prompt_are_a_part_of_its_cost() -> None:
    speed = PrefillSpeed()
    speed.note(pieces(1, 1, 98), 0.98)
    assert speed.work(100, 0) == pytest.approx(1.0)
