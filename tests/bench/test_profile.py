"""The latency model: known coefficients are recovered, and errors are those of held-out points."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.bench import Record
from pdctl.bench.profile import DECODE, PREFILL, Line, Point, Profile, _coefficients, fit, load, path_of, save
from pdctl.commands.bench.profile import _batches, _lengths, _step, summary

COEFFICIENTS = st.tuples(st.floats(1e-3, 0.1), st.floats(1e-5, 1e-3), st.floats(1e-8, 1e-6))


def prefills(coefficients: tuple[float, float, float], noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng, line = random.Random(seed), Line(coefficients, 0, 0, (0, 0))
    points = [Point(PREFILL, length, 1, 1.0) for length in (16, 32, 64, 128, 256, 512, 1024) for _ in range(4)]
    return [Point(p.kind, p.tokens, p.batch, line.seconds(p.row) * rng.uniform(1 - noise, 1 + noise)) for p in points]


@given(COEFFICIENTS)
def test_a_line_without_noise_is_found(coefficients: tuple[float, float, float]) -> None:
    points = prefills(coefficients)
    found = fit(points)
    assert found.error < 1e-6
    assert found.points == (17, 11)
    for point in points:
        assert found.seconds(point.row) == pytest.approx(point.seconds, rel=1e-5)


@given(COEFFICIENTS, st.integers(0, 99))
def test_noise_is_told_as_error(coefficients: tuple[float, float, float], seed: int) -> None:
    found = fit(prefills(coefficients, 0.2, seed), seed)
    assert 0.01 < found.error < 0.3
    assert found.error_p90 >= found.error * 0.8
    assert min(found.coefficients) >= 0


def test_nothing_goes_below_zero() -> None:
    # Longer prompts cost less per token: the quadratic coefficient would be negative.
    points = [Point(PREFILL, length, 1, 0.01 + 1e-3 * length**0.7) for length in (16, 64, 256, 1024, 4096)] * 3
    found = fit(points)
    assert min(found.coefficients) == 0.0
    assert found.error < 0.5


def test_decode_by_streams_and_contexts() -> None:
    truth = Line((5e-3, 2e-6, 1e-3), 0, 0, (0, 0))
    points = [Point(DECODE, batch * context, batch, 1.0) for batch in (1, 2, 4, 8) for context in (50, 300, 900)]
    made = [Point(p.kind, p.tokens, p.batch, truth.seconds(p.row)) for p in points]
    assert fit(made).coefficients == pytest.approx(truth.coefficients, rel=1e-4)


def test_too_few_measurements() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit(prefills((1e-3, 1e-4, 0.0))[:7])


def test_it_is_kept_and_found_again(tmp_path: Path) -> None:
    line = fit(prefills((1e-2, 1e-4, 1e-8)))
    made = Profile("m", "2026-11-26 12:00", line, line, 512, 8)
    path = path_of(tmp_path, "demo")
    save(path, made)
    assert load(path) == made
    for broken in ("{", "{}", json.dumps({**json.loads(path.read_text()), "prefill": {"coefficients": "no"}})):
        path.write_text(broken)
        assert load(path) is None
    assert load(tmp_path / "none") is None
    first, each = summary(made)
    assert first == "first token, by prompt length: 23 ms for 128 tokens, 64 ms for 512 tokens"
    assert each.startswith("each further token, with 256 context tokens: ")
    assert "for 8 streams" in each


def test_what_is_measured() -> None:
    assert _lengths(512) == [16, 26, 43, 71, 116, 190, 312, 512]
    assert _batches(8) == [1, 2, 4, 8]
    assert _batches(6) == [1, 2, 4, 6]


@given(st.integers(0, 60))
def test_no_choice_of_columns_is_better(seed: int) -> None:
    points = prefills((2e-3, 1e-4, 1e-7), 0.3, seed)
    found = _coefficients(points)

    def error(coefficients: tuple[float, float, float]) -> float:
        return sum((Line(coefficients, 0, 0, (0, 0)).seconds(p.row) / p.seconds - 1) ** 2 for p in points)

    rng = random.Random(seed)
    for _ in range(50):
        a, b, c = (value * rng.uniform(0.9, 1.1) for value in found)
        assert error(found) <= error((a, b, c)) * (1 + 1e-9)


def test_steps_count_only_while_all_streams_ran() -> None:
    first = Record(0, 0, 1.0, 2.0, [0.1] * 10)
    second = Record(0, 0, 1.55, 3.05, [0.3] * 5)
    assert _step([first]) == 0.1
    assert _step([first, second]) in (0.1, pytest.approx(0.1), pytest.approx(0.2), pytest.approx(0.3))
    assert _step([first, Record(0, 0, 5.0, 6.0, [0.5] * 2)]) == 0.0
