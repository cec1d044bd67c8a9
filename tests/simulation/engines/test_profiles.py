"""Profiles and topologies of imagined engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdctl.bench import profile as profiles
from pdctl.engine.core.latency_file import LatencyFile
from pdctl.errors import ConfigError, PdctlError
from pdctl.host.models import fingerprint
from pdctl.latency import StepTimes, step_of
from pdctl.simulation.engines.fleets import Memory, checked, of_topology, of_wishes, parse_fault, parse_wish
from pdctl.simulation.engines.models import Models
from pdctl.simulation.engines.profiles import own_speed, read_speed
from pdctl.simulation.spec import EngineSpec, Fault, ServiceSpec
from pdctl.topology.loader import load_imagined

TIMES = StepTimes((0.02, 0.001, 1e-7, 0.002, 1e-6))
STEPS = [step_of([(512, 0)]), step_of([(1, 300)]), step_of([(1, 300)] * 8), step_of([(1, 300), (64, 0)])]


def close(one: StepTimes, other: StepTimes) -> bool:
    return all(one.seconds(step) == pytest.approx(other.seconds(step), rel=0.02) for step in STEPS)


def test_a_model_knows_the_times_of_its_profile_and_learns_alone() -> None:
    models = Models()
    first, second = models.of(TIMES), models.of(TIMES)
    assert close(first.times, TIMES)
    for _ in range(200):
        first.took(STEPS[0], 3 * TIMES.seconds(STEPS[0]))
    assert not close(first.times, TIMES)
    assert close(second.times, TIMES)


def test_coefficients_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"coefficients": list(TIMES.coefficients)}))
    assert read_speed(path).times == TIMES
    half = read_speed(path).scaled(0.5)
    assert half.times.seconds(STEPS[0]) == pytest.approx(2 * TIMES.seconds(STEPS[0]))
    assert half.source == f"{path}, 0.5 times as fast"


@pytest.mark.parametrize("text", ["", "{}", '{"coefficients": [1, 2]}', '{"coefficients": [0, 0, 1, 1, 1]}',
                                  '{"coefficients": [1, 1, 1, 1, -1]}'])  # fmt: skip
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(PdctlError, match=r"bad\.json"):
        read_speed(path)


def test_the_lines_of_bench_profile(tmp_path: Path) -> None:
    prefill = profiles.Line((0.022, 0.001, 5e-8), 0.1, 0.2, (9, 9))
    decode = profiles.Line((0.02, 1e-6, 0.003), 0.1, 0.2, (9, 9))
    path = tmp_path / "profile.json"
    profiles.save(path, profiles.Profile("m", "today", prefill, decode, 512, 8))
    assert close(read_speed(path).times, TIMES)


def test_what_an_engine_of_this_machine_has_measured(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(PdctlError, match="no engine has measured"):
        own_speed(tmp_path, model)
    for name in ("another", fingerprint(model)):
        LatencyFile(tmp_path / "latency", (name, "float32", "a CPU")).save(Models().of(TIMES))
    found = own_speed(tmp_path, model)
    assert close(found.times, TIMES)
    assert "float32, a CPU" in found.source
    assert found.dtype == "float32"
    assert read_speed(Path(found.source.split(" ")[0])).times == found.times


TOPOLOGY = """
[service]
model = "m"
max_model_len = 512
[slo]
ttft_ms = 900
[proxy]
routing = "slo"
[[engines]]
name = "p"
role = "prefill"
cpus = [900]
kv_cache_gb = 0.5
block_size = 32
policy = "edf"
[[engines]]
name = "d"
role = "decode"
replicas = 2
max_num_seqs = 40
"""


def test_a_topology_for_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "far.toml"
    path.write_text(TOPOLOGY)
    spec = of_topology(load_imagined(path), read_times(tmp_path), Memory(2**20), cores=2, slowdown=1.2)
    assert [engine.name for engine in spec.engines] == ["p-0", "d-0", "d-1"]
    prefill, decode, _ = spec.engines
    assert (prefill.role, prefill.policy, prefill.block_size, prefill.blocks) == ("prefill", "edf", 32, 16)
    assert (decode.max_num_seqs, decode.max_model_len, decode.machine) == (40, 512, "cpus")
    assert (spec.ttft_s, spec.routing, spec.machines["cpus"].cores) == (0.9, "slo", 2)
    assert of_topology(load_imagined(path), read_times(tmp_path), Memory(2**20, 2.0), 2, 1.0).engines[0].blocks == 64
    with pytest.raises(PdctlError, match="no block"):
        of_topology(load_imagined(path), read_times(tmp_path), Memory(2**30), 2, 1.0)


def read_times(folder: Path):  # type: ignore[no-untyped-def]
    (folder / "times.json").write_text(json.dumps({"coefficients": list(TIMES.coefficients)}))
    return read_speed(folder / "times.json")


def test_a_topology_is_checked_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(TOPOLOGY.replace("replicas", "copies"))
    with pytest.raises(ConfigError):
        load_imagined(path)
    path.write_text(TOPOLOGY.replace('role = "decode"', 'role = "prefill"'))
    with pytest.raises(ConfigError):
        load_imagined(path)
    path.write_text(TOPOLOGY + '[[engines]]\nname = "v"\nrole = "decode"\nurl = "http://10.0.0.1:1"\n')
    with pytest.raises(PdctlError, match="attached"):
        of_topology(load_imagined(path), read_times(tmp_path), Memory(2**20), 2, 1.0)


def test_engines_and_deaths_in_a_few_words() -> None:
    wishes = [parse_wish(word) for word in ("prefill", "decode:2@0.5", "hybrid:3@gpu.json")]
    assert [(wish.role, wish.count, wish.speed) for wish in wishes] == [
        ("prefill", 1, ""), ("decode", 2, "0.5"), ("hybrid", 3, "gpu.json"),
    ]  # fmt: skip
    for word in ("", "both", "decode:0", "decode:x", "decode@"):
        with pytest.raises(PdctlError, match="is not an engine"):
            parse_wish(word)
    assert parse_fault("d-0:30:5.5") == Fault("d-0", 30.0, 5.5)
    for word in ("d-0", "d-0:1", "d-0:-1:2", "d-0:x:2"):
        with pytest.raises(PdctlError, match="is not a death"):
            parse_fault(word)
    base = EngineSpec("x", "hybrid", TIMES, 10)
    speed = type("Speed", (), {"times": TIMES})()
    engines = of_wishes([(wish, speed) for wish in wishes[:2]], base)
    assert [engine.name for engine in engines] == ["prefill-0", "decode-0", "decode-1"]
    with pytest.raises(PdctlError, match="no such engine"):
        checked(ServiceSpec(engines, faults=(Fault("d", 1.0, 1.0),)))
