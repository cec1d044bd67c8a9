"""Comparisons and pages."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pdctl.bench import Record
from pdctl.bench.client import Run
from pdctl.bench.compare import compare, read
from pdctl.bench.metrics import Figures, Targets, figures, percentile
from pdctl.bench.report import page, series, text
from pdctl.errors import PdctlError


def result(gap: float, count: int = 60, failed: int = 0) -> Figures:
    rng = random.Random(1)
    run = Run(started_at=0.0, ended_at=10.0)
    for number in range(count):
        gaps = [gap * rng.uniform(0.8, 1.2) for _ in range(20)]
        record = Record(number * 0.1, number * 0.1, number * 0.1 + 0.2, 0.0, gaps, 10, 21)
        record.ended_at = record.first_at + sum(gaps)
        record.error = "gone" if number < failed else ""
        run.records.append(record)
    return figures(run, Targets(tpot=1000 * gap * 1.05))


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
    assert {ratio.verdict for ratio in same.values()} == {"no difference shown", "one run each: not known"}


def test_failed_answers_are_not_compared() -> None:
    assert len(result(0.02, failed=5)["ttfts"]) == 60  # type: ignore[arg-type]
    assert result(0.02, failed=5)["completed"] == 55
    found = compare(result(0.02, failed=55), result(0.02))
    assert {ratio.name for ratio in found} >= {"ITL p50", "request throughput"}


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result(0.02)))
    assert read(path)["completed"] == 60
    for content, why in (("{", "no JSON"), ("{}", "holds no samples"), ("[]", "holds no samples")):
        path.write_text(content)
        with pytest.raises(PdctlError, match=why):
            read(path)
    good = json.loads(json.dumps(result(0.02)))
    for change, why in (
        ({"itls": good["itls"][1:]}, "not of one length"), ({"errors": []}, "not of one length"),
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
    """Whether each tag is closed, and what a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "iframe", "object"):
            self.fetched.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value and value != "data:,"]
        if tag not in ("meta", "link", "rect", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "polyline"):
            assert self.open.pop() == tag


def test_a_page_is_whole_and_fetches_nothing() -> None:
    checker = Checker()
    made = page(result(0.02), "a <b> & c", (50, 90, 99), "note <x>")
    checker.feed(made)
    assert not checker.open
    assert not checker.fetched
    assert "a &lt;b&gt; &amp; c" in made
    assert "note &lt;x&gt;" in made
    assert made.count("<svg") == 4
    for x, y in re.findall(r"(\d+\.\d),(\d+\.\d)", made):
        assert 0 <= float(x) <= 640
        assert 0 <= float(y) <= 260
    empty = page(figures(Run(started_at=0, ended_at=1), Targets()), "empty", (50,))
    Checker().feed(empty)


def test_the_table() -> None:
    lines = text(result(0.02), Targets(tpot=21), (50, 99)).splitlines()
    assert lines[0] == "60 answered, 0 failed, 0 truncated in 10.0 s"
    assert lines[2].startswith("goodput ")
    assert lines[4].split() == ["MS", "MEAN", "P50", "P99"]
    assert lines[5].split()[:3] == ["TTFT", "200.0", "200.0"]


def test_failed_answers_are_not_drawn() -> None:
    found = series(result(0.02, failed=55))
    assert {len(values) for name, values in found.items() if name != "Between tokens"} == {5}
    assert min(found["Time to first token"]) > 100
