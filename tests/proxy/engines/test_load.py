from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.proxy.engines.load import LoadMeter, SharedLoads, Window
from pdctl.proxy.engines.routing import Load


def test_speed_is_work_per_busy_second_however_many_run_side_by_side() -> None:
    meter = LoadMeter()
    for start in range(20):
        # Four at once, done together after one second; idle for nine.
        for _ in range(4):
            meter.begin(25, start * 10)
        for _ in range(4):
            meter.end(25, start * 10 + 1, True)
    assert meter.speed == pytest.approx(100, rel=0.3)
    assert meter.pending == 0


def test_what_was_given_up_is_not_pending_and_not_done() -> None:
    meter = LoadMeter()
    meter.begin(5, 0)
    meter.end(5, 1, False)
    assert (meter.pending, meter.speed) == (0, 0)


@given(st.lists(st.floats(0, 100), max_size=100))
def test_a_window_is_the_mean_of_its_last_samples(samples: list[float]) -> None:
    window = Window()
    for sample in samples:
        window.add(sample)
    last = samples[-32:]
    found = window.recent()
    assert found.samples == len(last)
    assert found.seconds == pytest.approx(sum(last) / len(last) if last else 0.0, abs=1e-6)


def test_workers_see_each_others_loads_and_a_new_life_begins_empty(tmp_path: Path) -> None:
    tables = [SharedLoads(tmp_path / "loads", 2, 3, worker) for worker in range(2)]
    busy = LoadMeter(pending=7.0, speed=2.0)
    tables[0].publish(1, busy, LoadMeter(pending=1.0))
    tables[1].publish(1, busy, LoadMeter(pending=2.0, speed=5.0))
    for table in tables:
        assert table.loads(1, 0.0) == (Load(14, 4), Load(3, 5))
        assert table.loads(0, 0.0) == (Load(0, 0), Load(0, 0))
    SharedLoads(tmp_path / "loads", 2, 3, 0)
    assert tables[1].loads(1, 0.0) == (Load(7, 2), Load(2, 5))


def test_what_an_idle_engine_was_measured_at_is_forgotten(tmp_path: Path) -> None:
    table = SharedLoads(tmp_path / "loads", 1, 1, 0)
    meter = LoadMeter()
    meter.begin(10, 100)
    meter.end(10, 105, True)
    table.publish(0, meter, LoadMeter())
    assert not meter.is_old(135)
    assert table.loads(0, 135)[0] == Load(0, 2)
    assert meter.is_old(136)
    assert table.loads(0, 136)[0] == Load(0, 0)
    meter.begin(1, 200)
    table.publish(0, meter, LoadMeter())
    assert not meter.is_old(300), "work that takes long is no idleness"
    assert table.loads(0, 300)[0] == Load(1, 2)
