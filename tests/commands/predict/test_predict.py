"""`pdctl simulate` and `pdctl recommend`, as a user calls them. Nothing is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli
from typer.testing import CliRunner, Result

from pdctl.bench.compare import read
from pdctl.cli import app
from pdctl.errors import PdctlError
from pdctl.topology.loader import load_imagined

TOPOLOGY = """
[service]
name = "imagined"
model = "sample:gemma-3-270m"
max_model_len = 4096
[slo]
ttft_ms = 800
tpot_ms = 40
[[engines]]
name = "prefill"
role = "prefill"
[[engines]]
name = "decode"
role = "decode"
"""
LOAD = ["--rate", "4", "--input", "100-600", "--output", "1-20", "-n", "60"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "pd.toml").write_text(TOPOLOGY)
    (tmp_path / "speed.json").write_text(json.dumps({"coefficients": [0.005, 0.0002, 0.0, 0.0002, 0.0]}))
    return ["-f", str(tmp_path / "pd.toml"), "--profile", str(tmp_path / "speed.json"), "--kv-token-bytes", "40000"]


def called(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def failed(*words: str) -> PdctlError:
    failure = called(*words).exception
    assert isinstance(failure, PdctlError), failure
    return failure


class TestSimulate:
    def test_a_table_and_the_same_numbers_each_time(self, files: list[str]) -> None:
        first, second = (called("simulate", *files, *LOAD) for _ in range(2))
        assert first.exit_code == 0, first.output
        assert first.stdout == second.stdout
        assert called("simulate", *files, *LOAD, "--seed", "1").stdout != first.stdout
        for part in ("60 answered, 0 failed", "TTFT", "prefill-0", "decode-0", "computed inline", "goodput"):
            assert part in first.stdout

    def test_json_is_a_result_that_bench_reads(self, files: list[str], tmp_path: Path) -> None:
        out = tmp_path / "result.json"
        shown = json.loads(called("simulate", *files, *LOAD, "--json", "--out", str(out)).stdout)
        assert shown == read(out)
        assert shown["completed"] == 60
        assert 0 < shown["p50_ttft_ms"] < shown["p99_ttft_ms"]
        assert shown["pdctl"]["attainment"] > 0
        engines = shown["simulation"]["engines"]
        assert [engine["name"] for engine in engines] == ["prefill-0", "decode-0"]
        assert all(0 < engine["busy"] <= 1 for engine in engines)

    def test_other_engines_speeds_and_deaths(self, files: list[str]) -> None:
        words = ["--engine", "prefill:2", "--engine", "decode:2@0.25", "--kill", "decode-1:5:3", "--json"]
        found = json.loads(called("simulate", *files, *LOAD, *words).stdout)
        assert (found["completed"], found["failed"]) == (60, 0)
        assert [engine["lives"] for engine in found["simulation"]["engines"]] == [1, 1, 1, 2]
        alone = json.loads(called("simulate", *files, *LOAD, "--json").stdout)
        assert found["p50_tpot_ms"] > alone["p50_tpot_ms"]

    @pytest.mark.parametrize("words", [
        ["--slowdown", "2"], ["--cores", "1"], ["--call-ms", "50"], ["--jitter", "0.5"], ["--bandwidth", "0.01"],
        ["--latency-ms", "100"], ["--chunk", "64"], ["--routing", "slo", "--engine", "prefill:3", "--engine", "decode"],
        ["--kv-gb", "0.05"], ["--warm-up", "9"], ["--tpot-ms", "10"], ["--ttft-ms", "100"],
    ])  # fmt: skip
    def test_every_option_has_an_effect(self, files: list[str], words: list[str]) -> None:
        load = [*LOAD, "--input", "400-900", "--rate", "8"]
        plain, other = (called("simulate", *files, *load, *more).stdout for more in ([], words))
        assert "60 answered" in other
        assert plain != other

    def test_policies_have_an_effect(self, files: list[str]) -> None:
        load = [*LOAD, "--rate", "20", "--input", "50-3000", "--engine", "prefill", "--engine", "decode"]
        assert called("simulate", *files, *load, "--policy", "sjf").stdout != called("simulate", *files, *load).stdout

    def test_prompts_with_a_common_beginning_hit_the_cache(self, files: list[str]) -> None:
        load = ["--workload", "shared-prefix", "--prefixes", "1", "--prefix", "2000", "--input", "20", "--rate", "2"]
        cached = json.loads(called("simulate", *files, *load, "-n", "30", "--json").stdout)
        alone = ["--input", "2020", "--rate", "2", "-n", "30", "--json"]
        assert cached["p50_ttft_ms"] < 0.5 * json.loads(called("simulate", *files, *alone).stdout)["p50_ttft_ms"]

    def test_what_cannot_be_simulated_is_refused(self, files: list[str], tmp_path: Path) -> None:
        assert "is not a policy" in failed("simulate", *files, *LOAD, "--policy", "best").message
        assert "is not a policy" in failed("simulate", *files, *LOAD, "--routing", "best").message
        assert "there is no such engine" in failed("simulate", *files, *LOAD, "--kill", "decode-7:1:1").message
        assert "must be greater than 0" in failed("simulate", *files, *LOAD, "--engine", "decode@-1").message
        assert "are the same" in failed("simulate", *files, "--trace", "a", "--data", "b").message
        (tmp_path / "vllm.toml").write_text(TOPOLOGY.replace("role =", 'kind = "vllm"\nrole ='))
        words = ["-f", str(tmp_path / "vllm.toml"), *files[2:], *LOAD]
        assert "of kind 'vllm'" in failed("simulate", *words).message


class TestRecommend:
    WORDS = (*LOAD, "--seeds", "2")

    def test_it_says_what_to_do_and_writes_a_topology_that_loads(self, files: list[str], tmp_path: Path) -> None:
        out = tmp_path / "new.toml"
        found = called("recommend", *files, *self.WORDS, "--out", str(out))
        assert found.exit_code == 0, found.output
        assert "recommended: " in found.stdout
        assert "disaggregate" in found.stdout
        loaded = load_imagined(out)
        assert sum(group.replicas for group in loaded.engines) == 2
        assert (loaded.slo.ttft_ms, loaded.service.model) == (800, "sample:gemma-3-270m")
        assert called("simulate", "-f", str(out), *files[2:], *LOAD).exit_code == 0

    def test_json(self, files: list[str], tmp_path: Path) -> None:
        words = [*self.WORDS, "--engines", "3", "--ttft-ms", "300", "--json"]
        found = json.loads(called("recommend", *files, *words).stdout)
        best = found["recommended"]
        assert best["prefills"] + best["decodes"] + best["hybrids"] == 3
        assert found["disaggregate"] == bool(best["prefills"])
        assert best["goodput"]["low"] <= best["goodput"]["value"] <= best["goodput"]["high"]
        assert any(one["hybrids"] == 3 for one in found["finalists"])

    def test_a_page_with_the_plot(self, files: list[str], tmp_path: Path) -> None:
        called("recommend", *files, *self.WORDS, "--html", str(tmp_path / "page.html"))
        page = (tmp_path / "page.html").read_text()
        assert "<svg" in page
        assert "predicted, not measured" in page

    def test_pins_are_kept(self, files: list[str], tmp_path: Path) -> None:
        pinned = TOPOLOGY.replace('role = "prefill"', 'role = "prefill"\ncpus = [0]')
        (tmp_path / "pd.toml").write_text(pinned.replace('role = "decode"', 'role = "decode"\ncpus = [1]'))
        out = tmp_path / "new.toml"
        called("recommend", *files, *self.WORDS, "--out", str(out))
        groups = tomli.loads(out.read_text())["engines"]
        assert sorted(cpu for group in groups for cpu in group["cpus"]) == [0, 1]

    def test_a_load_needs_a_rate_and_deaths_do_nothing(self, files: list[str]) -> None:
        assert "needs a rate" in failed("recommend", *files).message
        assert "--warm-up does nothing here" in failed("recommend", *files, *LOAD, "--warm-up", "1").message
        assert "--kill does nothing here" in failed("recommend", *files, *LOAD, "--kill", "decode-0:1:1").message
