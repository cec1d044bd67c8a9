"""The latency model from one start to the next."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest

from pdctl.engine.core.latency_file import LatencyFile
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.latency import step_of

KEY = ("model", "float32", "a CPU")
PROMPT = step_of([(100, 0)])


def model() -> LatencyModel:
    found = LatencyModel()
    for _ in range(20):
        found.took(PROMPT, 0.5)
    return found


def unwanted() -> LatencyModel:
    raise AssertionError("measured again")


def test_only_the_first_start_measures(tmp_path: Path) -> None:
    LatencyFile(tmp_path, KEY).load(model)
    found = LatencyFile(tmp_path, KEY).load(unwanted)
    assert found.times.seconds(PROMPT) == pytest.approx(0.5, rel=0.01)


def test_engines_that_start_together_measure_once(tmp_path: Path) -> None:
    measured, inside = [], threading.Barrier(2, timeout=60)

    def measure() -> LatencyModel:
        measured.append(1)
        inside.wait()
        return model()

    threads = [threading.Thread(target=LatencyFile(tmp_path, KEY).load, args=(measure,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    inside.wait()
    for thread in threads:
        thread.join(10)
    assert measured == [1]


def test_another_machine_measures_again(tmp_path: Path) -> None:
    LatencyFile(tmp_path, KEY).load(model)
    with pytest.raises(AssertionError, match="measured again"):
        LatencyFile(tmp_path, (*KEY[:2], "another CPU")).load(unwanted)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"key": [], "measured": {}, "format": 1}'])
def test_a_broken_file_is_measured_again(tmp_path: Path, content: bytes) -> None:
    LatencyFile(tmp_path, KEY).load(model)
    (path,) = tmp_path.glob("*.json")
    path.write_bytes(content)
    assert LatencyFile(tmp_path, KEY).load(model).is_fitted
    assert LatencyFile(tmp_path, KEY).load(unwanted).is_fitted


def test_sums_of_another_width_are_measured_again(tmp_path: Path) -> None:
    LatencyFile(tmp_path, KEY).load(model)
    (path,) = tmp_path.glob("*.json")
    kept = msgspec.json.decode(path.read_bytes())
    kept["measured"]["decode"]["totals"].append(0.0)
    path.write_bytes(msgspec.json.encode(kept))
    with pytest.raises(AssertionError, match="measured again"):
        LatencyFile(tmp_path, KEY).load(unwanted)


def test_what_was_learned_is_kept(tmp_path: Path) -> None:
    file = LatencyFile(tmp_path, KEY)
    found = file.load(model)
    for _ in range(300):
        found.took(PROMPT, 1.5)
    file.save(found)
    assert LatencyFile(tmp_path, KEY).load(unwanted).times.seconds(PROMPT) == pytest.approx(1.5, rel=0.1)


def test_without_a_usable_cache_the_engine_still_starts(tmp_path: Path) -> None:
    (tmp_path / "latency").write_text("not a folder")
    file = LatencyFile(tmp_path / "latency", KEY)
    found = file.load(model)
    assert found.is_fitted
    file.save(found)
