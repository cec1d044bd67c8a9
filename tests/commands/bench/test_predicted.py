"""`bench compare --simulated`: predictions and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdctl.cli import app
from pdctl.commands.bench.load import Load
from pdctl.commands.bench.predicted import beside, predictions, table
from pdctl.errors import PdctlError

TOPOLOGY = '[service]\nmodel = "sample:tiny-qwen3"\n[[engines]]\nname = "e"\nrole = "hybrid"\nreplicas = {count}\n'


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two topologies, and a profile."""
    one, two, speed = tmp_path / "one.toml", tmp_path / "two.toml", tmp_path / "speed.json"
    for path, count in ((one, 1), (two, 2)):
        path.write_text(TOPOLOGY.format(count=count))
    speed.write_text(json.dumps({"coefficients": [0.02, 0.001, 0.0, 0.0, 0.0]}))
    return one, two, speed


@pytest.fixture(autouse=True)
def known_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not prepared here, so what its KV takes is given."""
    from pdctl.commands.predict.imagined import Imagined
    from pdctl.simulation.engines.fleets import Memory

    monkeypatch.setattr(Imagined, "memory", lambda self, topology, speed: Memory(1000))


def test_each_topology_is_predicted_under_the_load(files: tuple[Path, Path, Path]) -> None:
    load = Load(rate=4.0, inputs="200", outputs="5", count=40, warm_up=2)
    one, two = predictions(files[:2], load, files[2])
    assert one["completed"] == two["completed"] == 40
    assert float(str(two["p50_ttft_ms"])) < float(str(one["p50_ttft_ms"])), "two engines are faster"
    with pytest.raises(PdctlError, match="cannot be simulated"):
        predictions(files[:2], Load(concurrency=3), files[2])


def test_predicted_beside_measured() -> None:
    measured = {"p50_ttft_ms": 100.0, "request_throughput": 2.0, "p99_tpot_ms": 0.0, "p50_itl_ms": 3.0}
    predicted = {"p50_ttft_ms": 110.0, "request_throughput": 2.0, "p99_tpot_ms": 5.0}
    found = beside(dict(measured), dict(predicted))
    assert [(one.name, one.ratio) for one in found] == [
        ("TTFT p50", pytest.approx(1.1)), ("TPOT p99", 0.0), ("requests/s", 1.0),
    ]  # fmt: skip
    lines = table(["a", "b"], [(dict(measured), dict(predicted))] * 2).splitlines()
    assert lines[0].split() == ["A", "PREDICTED", "RATIO", "B", "PREDICTED", "RATIO"]
    assert lines[1].split() == ["TTFT", "p50", "100", "110", "1.10", "100", "110", "1.10"]
    assert lines[2].split()[-1] == "-"


def test_results_cannot_be_predicted_and_a_profile_needs_a_prediction(files: tuple[Path, Path, Path]) -> None:
    one, two, speed = map(str, files)
    alone = CliRunner().invoke(app, ["bench", "compare", one, two, "--profile", speed]).exception
    assert isinstance(alone, PdctlError)
    assert "does nothing without --simulated" in alone.message
    results = CliRunner().invoke(app, ["bench", "compare", "a.json", "b.json", "--simulated"]).exception
    assert isinstance(results, PdctlError)
    assert "--simulated works only with topologies" in results.message
