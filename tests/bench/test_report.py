"""Comparisons and pages."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.bench import Record
from pdctl.bench.client import Run
from pdctl.bench.compare import compare, read
from pdctl.bench.measurements import Measurements, Targets, measurements, percentile
from pdctl.bench.report.observations import Curves, in_rows, on_engines, series
from pdctl.bench.report.page import comparison, curves, page, text
from pdctl.bench.report.plots import cdf, curve, lanes
from pdctl.errors import PdctlError


def result(gap: float, count: int = 60, failed: int = 0) -> Measurements:
    rng = random.Random(1)
    run = Run(started_at=0.0, ended_at=10.0)
    for number in range(count):
        gaps = [gap * rng.uniform(0.8, 1.2) for _ in range(20)]
        record = Record(number * 0.1, number * 0.1, number * 0.1 + 0.2, 0.0, gaps, 10, 21)
        record.ended_at = record.first_at + sum(gaps)
        record.error = "gone" if number < failed else ""
        run.records.append(record)
    return measurements(run, Targets(tpot=1000 * gap * 1.05))


@pytest.mark.parametrize("part", [0, 25, 50, 90, 99, 100])
def test_percentiles_are_numpys(part: int) -> None:
    numpy = pytest.importorskip("numpy")
    rng = random.Random(2)
    values = [rng.gauss(10, 3) for _ in range(37)]
    assert percentile(values, part) == pytest.approx(numpy.percentile(values, part))


def test_twice_as_slow_is_seen_as_that() -> None:
    found = {ratio.name: ratio for ratio in compare(result(0.04), result(0.02))}
    assert found["ITL p50"].ratio == pytest.approx(2.0, rel=0.02)
    low, high = found["ITL p50"].low, found["ITL p50"].high
    assert low is not None
    assert high is not None
    assert low < 2.0 < high
    assert found["ITL p50"].verdict == "first is higher: worse"
    assert found["TTFT p50"].verdict == "no difference shown"
    same = {ratio.name: ratio for ratio in compare(result(0.02), result(0.02))}
    assert {ratio.verdict for ratio in same.values()} == {"no difference shown", "unknown: only one run each"}


def test_failed_answers_are_not_compared() -> None:
    ttfts = result(0.02, failed=5)["ttfts"]
    assert isinstance(ttfts, list)
    assert len(ttfts) == 60
    assert result(0.02, failed=5)["completed"] == 55
    found = compare(result(0.02, failed=55), result(0.02))
    assert {ratio.name for ratio in found} >= {"ITL p50", "request throughput"}


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result(0.02)))
    assert read(path)["completed"] == 60
    for content, why in (("{", "is not JSON"), ("{}", "contains no samples"), ("[]", "contains no samples")):
        path.write_text(content)
        with pytest.raises(PdctlError, match=why):
            read(path)
    good = json.loads(json.dumps(result(0.02)))
    for change, why in (
        ({"itls": good["itls"][1:]}, "different lengths"), ({"errors": []}, "different lengths"),
        ({"ttfts": [None] * 60}, "ttfts are not all numbers"), ({"itls": [3] * 60}, "not all lists of numbers"),
    ):  # fmt: skip
        path.write_text(json.dumps(good | change))
        with pytest.raises(PdctlError, match=why):
            read(path)
    path.write_text(json.dumps(good | {"pdctl": {"repeats": {"runs": "none"}, "met": 3}}))
    assert compare(read(path), read(path))
    with pytest.raises(PdctlError, match="cannot be read"):
        read(tmp_path / "none")


class Checker(HTMLParser):
    """Checks that each tag is closed, and records what a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "iframe", "object"):
            self.fetched.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value and value != "data:,"]
        if tag not in ("meta", "link", "rect", "path", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path", "polyline"):
            assert self.open.pop() == tag


def test_a_page_is_whole_and_fetches_nothing() -> None:
    checker = Checker()
    made = page(result(0.02), "a <b> & c", (50, 90, 99), "note <x>")
    checker.feed(made)
    assert not checker.open
    assert not checker.fetched
    assert "a &lt;b&gt; &amp; c" in made
    assert "note &lt;x&gt;" in made
    assert made.count('class="frame"') == 4
    for x, y in re.findall(r"(-?\d+\.\d),(-?\d+\.\d)", made):
        assert 0 <= float(x) <= 1000
        assert 0 <= float(y) <= 1000
    empty = page(measurements(Run(started_at=0, ended_at=1), Targets()), "empty", (50,))
    Checker().feed(empty)


def test_the_table() -> None:
    lines = text(result(0.02), Targets(tpot=21), (50, 99)).splitlines()
    assert lines[0] == "60 answered, 0 failed, 0 truncated in 10.0 s"
    assert lines[2].startswith("goodput ")
    assert lines[3] == "this client used 0.0% of a core and woke up 0.0 ms late at p99"
    assert lines[5].split() == ["MS", "MEAN", "P50", "P99"]
    assert lines[6].split()[:3] == ["TTFT", "200.0", "200.0"]


def test_failed_answers_are_not_drawn() -> None:
    found = series(result(0.02, failed=55))
    assert {len(values) for name, values in found.items() if name != "Inter-token latency"} == {5}
    assert min(found["Time to first token"]) > 100


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=60))
def test_rows_hold_all_without_overlap_and_are_no_more_than_needed(found: list[tuple[int, int]]) -> None:
    stretches = [(float(begin), float(begin + length)) for begin, length in found]
    rows = in_rows(stretches)
    assert sorted(stretch for row in rows for stretch in row) == sorted(stretches)
    for row in rows:
        assert all(before[1] <= after[0] for before, after in pairwise(row))
    most_at_once = max(sum(begin <= at < end for begin, end in stretches) for at, _ in stretches)
    assert len(rows) == most_at_once


def test_a_hybrid_is_one_place() -> None:
    found = result(0.02, count=2, failed=1)
    ours, latencies = found["pdctl"], found["latencies"]
    assert isinstance(ours, dict)
    assert isinstance(latencies, list)
    for placed, engines in (
        ([["h", "h", 0.05], None], {"h": [(0.05, latencies[0])]}),
        ([["", "d", 0.0], None], {"d": [(0.0, latencies[0])]}),
        (None, {}),
        ([["h", "h", 0.05]], {}),
    ):  # fmt: skip
        ours["placed"] = placed
        assert on_engines(found) == engines
    assert lanes({}, 0.0) == ""


def test_curves() -> None:
    found = Curves("GB/s by size", "MiB", {"shm": [(1, 2.0), (64, 4.0)], "a <b>": [(64, 1.0)]})
    drawn = curve(found)
    assert drawn.count("<polyline") == 2
    assert re.findall(r'class="x"[^>]*>(\d+)<', drawn) == ["1", "64"]
    points = re.findall(r'class="dot s\d" d="M([\d.]+),([\d.]+)h0"', drawn)
    assert points[1][0] == points[2][0], "one place for one value"
    assert float(points[0][1]) > float(points[1][1]), "more is higher"
    checker = Checker()
    checker.feed(curves([found, Curves("none", "x", {})], "t", "s", (["A"], [["1"]])))
    assert not checker.open


def test_hybrids_that_prefill_for_each_other() -> None:
    found = result(0.02, count=4)
    ours = found["pdctl"]
    assert isinstance(ours, dict)
    ours["placed"] = [["h0", "h1", 0.0], ["h1", "h0", 0.0], ["h0", "h0", 0.0], ["h1", "h1", 0.0]]
    assert {name: len(stretches) for name, stretches in on_engines(found).items()} == {"h0": 3, "h1": 3}


def test_many_requests_are_drawn_in_as_many_rows_as_few() -> None:
    for count in (50, 5000):
        stretches = [(number / 10, number / 10 + 0.95) for number in range(count)]
        drawn = lanes({"d": stretches}, 0.0)
        assert len(set(re.findall(r'<rect x="[^"]*" y="([^"]*)"', drawn))) == 10
        assert drawn.count("<rect") <= min(count, 10 * 640)


def test_what_a_picture_shows_lies_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = pytest.importorskip("pdctl.bench.report.pictures")
    observed = {}
    saved = pictures._saved

    def spied(figure: object, axes: Any, path: Path, *rest: Any) -> str:
        name = saved(figure, axes, path, *rest)
        low, high = sorted(axes.get_ylim())
        observed[path.stem] = all(low <= y <= high for line in axes.get_lines() for y in line.get_ydata() if y == y)
        observed[path.stem] &= all(low <= y <= high for y in axes.dataLim.intervaly) and low < high
        return str(name)

    monkeypatch.setattr(pictures, "_saved", spied)
    found = result(0.02)
    ours = found["pdctl"]
    assert isinstance(ours, dict)
    ours["placed"] = [["p", f"d{number % 2}", 0.01] for number in range(60)]
    ours["engines"] = {"at": [1.0, 2.0], "engines": {"p": {
        "running": [3.0, 9.0], "kv_used": [0.5, 1.0], "leases": [4.0, None], "waiting": [0.0, 0.0]}}}  # fmt: skip
    pictures.pictures(tmp_path, {"": found})
    pictures.curve_pictures(tmp_path, {"size": Curves("GB/s", "MiB", {"shm": [(1, 12.0), (64, 7.0)]})})
    assert observed == dict.fromkeys(("ttft", "itl", "e2e", "requests", "running", "kv_used", "leases", "size"), True)


def test_percentiles_are_marked() -> None:
    values = [float(value) for value in range(1, 201)]
    drawn = cdf({"": values})
    assert re.findall(r'class="m"[^>]*>([^<]*)<', drawn) == ["p50 100 ms", "p90 180 ms", "p99 198 ms"]
    dots = [(float(x), float(y)) for x, y in re.findall(r'class="dot s0" d="M([\d.]+),([\d.]+)h0"', drawn)]
    most = percentile(values, 99.5)
    assert [x for x, _ in dots] == pytest.approx([1000 * percentile(values, part) / most for part in (50, 90, 99)],
                                                 abs=0.1)  # fmt: skip
    assert [y for _, y in dots] == [500, 100, 10]
    assert re.findall(r'class="x[ "][^>]*>([^<]*)<', drawn) == ["0", "50", "100", "150"]
    assert ">ms<" in drawn
    outlier = cdf({"": [*values, 9000.0, 9000.0]})
    assert re.findall(r'class="x[ "][^>]*>([^<]*)<', outlier)[-1] == "200", "outliers do not press the rest together"
    slow = cdf({"a": [20_000.0 + value for value in values], "b": values})
    assert ">s<" in slow, "an axis of seconds"
    assert "20.1 s" in slow
    assert 'class="m"' not in slow, "with several, the values stand in the legend"
    assert re.findall(r"<th>(p\d+)</th>", slow) == ["p50", "p90", "p99"]


def test_several_runs_on_one_page() -> None:
    made = comparison({f"r{n}": result(0.01 * n) for n in (1, 2, 3)}, {"r2": [], "r3": []}, "three")
    rows = [re.findall(r"<td( class=.best.)?>([^<]*)</td>", row) for row in re.findall(r"<tr>.*?</tr>", made)]
    by_name = {row[0][1]: row[1:] for row in rows if row}
    assert [bool(best) for best, _ in by_name["ITL p50, ms"]] == [True, False, False], "less is better"
    assert [bool(best) for best, _ in by_name["answered"]] == [False] * 3, "all the same"
    assert float(by_name["ITL p50, ms"][1][1]) == pytest.approx(20, rel=0.02)
    quick = comparison({"a": result(0.01, failed=9), "b": result(0.01)}, {"b": []}, "two")
    answered = re.findall(r"<td>answered</td><td( class=.best.)?>51</td><td( class=.best.)?>60</td>", quick)
    assert [tuple(map(bool, found)) for found in answered] == [(False, True)], "more is better"
    checker = Checker()
    checker.feed(made)
    assert not checker.open
    assert not checker.fetched


def test_the_load_of_a_result_is_said() -> None:
    found = result(0.02) | {"model_id": "m<1>", "request_rate": 4.0, "max_concurrency": None, "num_prompts": 60}
    assert "model: m&lt;1&gt;; requests: 60; requests/s: 4.0</p>" in page(found, "t", (50,))
    assert 'class="faint"' not in page(result(0.02), "t", (50,))


def test_what_a_phone_leaves_out() -> None:
    few, many = (curve(Curves("t", "x", {"a": [(n, 1.0) for n in range(count)]})) for count in (3, 6))
    assert 'class="x"' in few
    assert 'class="x many"' in many
