"""Intervals from resampled requests and from repeated runs."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pdctl.bench import Record
from pdctl.bench.client import Run
from pdctl.bench.compare import Ratio, Resampled, compare, with_goodput
from pdctl.bench.measurements import Measurements, Targets, measurements, over_runs, pooled
from pdctl.cli import app
from pdctl.commands.bench.compare import _titles, verdicts
from tests.bench.test_report import result as made_result


@given(st.lists(st.lists(st.floats(0.1, 100), min_size=1, max_size=5), min_size=1, max_size=20), st.integers(0, 9))
def test_percentiles_of_drawn_clusters(clusters: list[list[float]], seed: int) -> None:
    drawn = Resampled(clusters).draw(random.Random(seed), [0, 50, 99, 100])
    again = random.Random(seed).choices(range(len(clusters)), k=len(clusters))
    values = sorted(value for owner in again for value in clusters[owner])
    assert len(drawn) == 4
    assert drawn == sorted(drawn)
    assert (drawn[0], drawn[3]) == (values[0], values[-1])
    assert all(value in values for value in drawn)
    assert sum(value <= drawn[1] for value in values) >= len(values) / 2
    assert sum(value < drawn[1] for value in values) <= len(values) / 2


def run(seed: int, slow: float = 1.0, count: int = 40) -> Run:
    """Answers with gaps that are similar within one answer and differ between answers."""
    rng, made = random.Random(seed), Run(started_at=0.0, ended_at=10.0 * slow)
    for number in range(count):
        usual = rng.lognormvariate(-4, 0.5) * slow
        gaps = [usual * rng.uniform(0.95, 1.05) for _ in range(30)]
        record = Record(number * 0.1, number * 0.1, number * 0.1 + 0.2, 0.0, gaps, 10, 31)
        record.ended_at = record.first_at + sum(gaps)
        made.records.append(record)
    return made


def result(*runs: Run) -> Measurements:
    whole = measurements(pooled(runs), Targets())
    ours = whole["pdctl"]
    assert isinstance(ours, dict)
    ours["repeats"] = over_runs([measurements(one, Targets()) for one in runs])
    return whole


def test_gaps_of_one_answer_do_not_count_as_many() -> None:
    """If nothing differs, intervals exclude 1 about as rarely as they should, although gaps come in clusters."""
    wrong = 0
    for seed in range(20):
        found = {r.name: r for r in compare(result(run(seed)), result(run(1000 + seed)))}
        wrong += found["ITL p50"].is_shown
    assert wrong <= 4, "1 of 20 is expected"


def test_rates_have_intervals_over_rounds() -> None:
    slow = [run(n, 2.0 + n / 100) for n in range(4)]
    found = {r.name: r for r in compare(result(*(run(n) for n in range(4, 8))), result(*slow))}
    rate = found["request throughput"]
    assert rate.low is not None
    assert rate.high is not None
    assert 1.9 < rate.low < rate.ratio < rate.high < 2.2
    assert rate.is_better
    assert rate.verdict == "first is higher: better"
    # One round per side: no difference can be shown.
    found = {r.name: r for r in compare(result(run(1), run(2, 2.5)), result(run(3, 2.0), run(4, 2.0)))}
    assert found["request throughput"].verdict == "no difference shown"
    alone = {r.name: r for r in compare(measurements(run(1), Targets()), measurements(run(3, 2.0), Targets()))}
    assert alone["request throughput"].low is None
    assert alone["request throughput"].verdict == "unknown: only one run each"


def test_goodput_from_samples_is_that_of_the_run() -> None:
    targets = Targets(ttft=300, tpot=20)
    made = run(5)
    made.records[0].error = "gone"
    known = measurements(made, targets)
    again = with_goodput(measurements(made, Targets()), targets)
    assert known["request_goodput"] == again["request_goodput"] != 0


def test_goodput_has_an_interval() -> None:
    targets = Targets(ttft=300, tpot=20)
    found = {r.name: r for r in compare(measurements(run(1), targets), measurements(run(2), targets))}
    good = found["request goodput"]
    assert good.low is not None
    assert good.high is not None
    assert good.low < good.ratio < good.high
    # The same answers in half the time: twice the goodput, but one run each cannot show that the time differs.
    fast = run(1)
    fast.ended_at = 5.0
    twice = {r.name: r for r in compare(measurements(fast, targets), measurements(run(2), targets))}["request goodput"]
    assert twice.ratio == pytest.approx(2 * good.ratio)
    assert twice.low == pytest.approx(good.low)
    assert twice.high == pytest.approx(2 * good.high)
    all_met = Targets(ttft=1e6)
    same = {r.name: r for r in compare(measurements(fast, all_met), measurements(run(2), all_met))}["request goodput"]
    assert same.verdict == "no difference shown"
    none = {r.name: r for r in compare(measurements(run(1), Targets(ttft=1)), measurements(run(2), targets))}
    assert none["request goodput"].low is None


def test_runs_together() -> None:
    both = measurements(pooled([run(1), run(2, 3.0)]), Targets())
    assert (both["completed"], both["duration"]) == (80, 40.0)
    assert both["request_throughput"] == 2.0


def test_students_interval() -> None:
    made: list[Measurements] = [{"mean_ttft_ms": value, "completed": 1} for value in (10.0, 12.0, 14.0)]
    found = over_runs(made)
    assert found["mean"] == {"mean_ttft_ms": 12.0}
    # t(0.975, 2) = 4.303
    half = 4.303 * statistics.stdev((10, 12, 14)) / 3**0.5
    low = found["low"]
    assert isinstance(low, dict)
    assert low["mean_ttft_ms"] == pytest.approx(12 - half)
    assert over_runs(made[:1])["low"] == {"mean_ttft_ms": 10.0}


def test_where_the_first_loses_is_said() -> None:
    ratios = [
        Ratio("ITL p99", 5, 10, 0.5, 0.4, 0.6), Ratio("TTFT p99", 20, 10, 2.0, 1.8, 2.2),
        Ratio("request throughput", 1, 2, 0.5, 0.5, 0.5, more_is_better=True), Ratio("E2E p50", 1, 1, 1.0, 0.9, 1.1),
    ]  # fmt: skip
    assert verdicts(ratios, "pd") == [
        "pd is better in: ITL p99 (0.50x)",
        "pd is worse in: TTFT p99 (2.00x), request throughput (0.50x)",
        "no difference shown in: E2E p50 (1.00x)",
    ]


def test_starts_that_differ_widen_intervals() -> None:
    """Three rounds each with random variation between starts: no difference is shown, although requests agree."""
    ours = [run(n, slow) for n, slow in enumerate((1.0, 1.3, 0.9))]
    theirs = [run(n + 9, slow) for n, slow in enumerate((1.2, 0.9, 0.8))]
    found = {r.name: r for r in compare(result(*ours), result(*theirs))}
    assert found["TPOT p50"].verdict == "no difference shown"
    low, high = found["TPOT p50"].low, found["TPOT p50"].high
    assert low is not None
    assert high is not None
    assert low < 0.9
    assert high > 1.4


def test_names_of_two_are_different() -> None:
    for names, titles in (
        ("pd.toml one.toml", "pd one"), ("a/pd.toml b/pd.toml", "a-pd b-pd"), ("pd.toml pd.toml", "pd-1 pd-2"),
        ("pd.v1.toml pd.v2.toml", "pd.v1 pd.v2"), ("a/r.json b/r.json c.json", "a-r b-r c"),
    ):  # fmt: skip
        assert _titles(list(map(Path, names.split()))) == titles.split()


def test_several_results(tmp_path: Path) -> None:
    files = []
    for number in (1, 2, 3):
        files.append(str(tmp_path / f"r{number}.json"))
        Path(files[-1]).write_text(json.dumps(made_result(0.01 * number)))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["bench", "compare", *files, "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.stdout.splitlines() if "RATIO" in line] == [["R1", "R2"], ["R1", "R3"]]
    assert "r1 is better in: " in done.stdout
    for words in ("r1 against r2", "r1 against r3", "<th scope=\"col\">r3</th>"):
        assert words in page.read_text()
    found = json.loads(CliRunner().invoke(app, ["bench", "compare", *files, "--json"]).stdout)
    assert {name: [one["ratio"] for one in ratios if one["name"] == "ITL p50"] for name, ratios in found.items()} == {
        "r2": [pytest.approx(1 / 2, rel=0.02)], "r3": [pytest.approx(1 / 3, rel=0.02)],
    }  # fmt: skip
    two = json.loads(CliRunner().invoke(app, ["bench", "compare", *files[:2], "--json"]).stdout)
    assert two == found["r2"], "two results are a list, as they always were"
    three = CliRunner().invoke(app, ["bench", "compare", "a.toml", "b.toml", "c.toml"])
    assert "only two topologies" in str(three.exception)
    mixed = CliRunner().invoke(app, ["bench", "compare", files[0], files[1], "c.toml"])
    assert "of different kinds" in str(mixed.exception)
