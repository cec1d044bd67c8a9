"""Shared cores: processor sharing, and what busy cores cost each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.virtual import VirtualTime
from pdctl.simulation.engines.machine import Machine


def ends(cores: int, slowdown: float, jobs: list[tuple[float, float]]) -> list[float]:
    """When jobs end that begin at a time and take so many seconds alone."""
    time = VirtualTime()
    machine = Machine(time, cores, slowdown)
    found: dict[int, float] = {}

    def begin(number: int, seconds: float) -> None:
        machine.run(seconds, lambda: found.__setitem__(number, time()))

    for number, (at, seconds) in enumerate(jobs):
        time.at(at, lambda number=number, seconds=seconds: begin(number, seconds))  # type: ignore[misc]
    time.run()
    return [found[number] for number in range(len(jobs))]


def test_a_core_for_each_is_no_loss() -> None:
    assert ends(2, 1.0, [(0.0, 1.0), (0.0, 2.0)]) == pytest.approx([1.0, 2.0])


def test_one_core_for_two() -> None:
    assert ends(1, 1.0, [(0.0, 1.0), (0.0, 2.0)]) == pytest.approx([2.0, 3.0])
    assert ends(1, 1.0, [(0.0, 1.0), (0.5, 1.0)]) == pytest.approx([1.5, 2.0])


def test_busy_cores_slow_each_other_down() -> None:
    assert ends(2, 1.5, [(0.0, 1.0), (0.0, 2.0)]) == pytest.approx([1.5, 2.5])
    assert ends(3, 1.5, [(0.0, 1.0), (0.0, 1.0)]) == pytest.approx([1.25, 1.25]), "two of three are half of it"


JOBS = st.lists(st.tuples(st.floats(0, 10), st.floats(0.001, 5)), min_size=1, max_size=12)


@given(cores=st.integers(1, 4), slowdown=st.floats(1.0, 2.0), jobs=JOBS)
def test_no_work_is_lost_or_free(cores: int, slowdown: float, jobs: list[tuple[float, float]]) -> None:
    found = ends(cores, slowdown, jobs)
    for end, (at, seconds) in zip(found, jobs, strict=True):
        assert end >= at + seconds - 1e-6
    work = sum(seconds for _, seconds in jobs)
    assert max(found) <= max(at for at, _ in jobs) + work * slowdown + 1e-6
