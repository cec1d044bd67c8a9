"""Axes, and the colours of pages."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.bench.report.scales import (
    MOST_TICKS,
    ceiling,
    counted,
    latency,
    numbered,
    of_time,
    parts,
    step,
    ticks,
    written,
)
from pdctl.bench.report.style import DARK, DASHES, LIGHT, SERIES, STYLE

SIZES = st.floats(1e-6, 1e9)


@given(SIZES)
def test_ticks_are_round_and_few(most: float) -> None:
    found = ticks(most)
    assert 2 <= len(found) <= MOST_TICKS
    assert found[0] == 0
    assert found[-1] <= most * (1 + 1e-9)
    mantissa = step(most) / 10 ** math.floor(math.log10(step(most)) + 1e-9)
    assert min(abs(mantissa - round_) for round_ in (1, 2, 5)) < 1e-6


@given(SIZES)
def test_an_axis_ends_at_a_tick_above_its_values(most: float) -> None:
    top = ceiling(most)
    assert most * (1 - 1e-6) <= top <= most * 2.5
    assert top / step(most) == pytest.approx(round(top / step(most)))


@given(SIZES)
def test_ticks_are_told_apart(most: float) -> None:
    axis = numbered("x", most)
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)
    assert all(0 <= place <= 1 + 1e-9 for place, _ in axis.ticks)
    assert [float(text.replace(",", "")) for _, text in axis.ticks] == pytest.approx(ticks(most))


@given(st.floats(0, 1e6))
def test_counts_have_whole_ticks(most: float) -> None:
    axis, top = counted("requests", most)
    assert top >= most
    assert [text.replace(",", "").isdigit() for _, text in axis.ticks] == [True] * len(axis.ticks)
    assert 2 <= len(axis.ticks) <= MOST_TICKS
    assert axis.ticks[-1][0] == pytest.approx(1)


def test_examples() -> None:
    assert ticks(310) == [0, 100, 200, 300]
    assert ceiling(310) == 400
    assert ceiling(0.45) == 0.5
    assert [text for _, text in parts("in use").ticks] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    assert [text for _, text in numbered("", 12_000).ticks] == ["0", "5,000", "10,000"]
    assert written(0.25, 0.05) == "0.25"
    assert step(0) == step(math.inf) == 1
    assert of_time(9_999) == (1.0, "ms")
    assert [latency(value) for value in (9.42, 120.4, 1234.0, 12_345.0)] == ["9.42 ms", "120 ms", "1,234 ms", "12.3 s"]


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts_of = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts_of]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_aa(colours: dict[str, str]) -> None:
    for text in ("text", "faint", "best"):
        for below in ("page", "head"):
            assert contrast(colours[text], colours[below]) >= 4.5, (text, below)
    assert contrast(colours["text"], colours["warn"]) >= 4.5
    for shape in ("axis", "warn-edge", "wait", *(f"c{n}" for n in range(SERIES))):
        assert contrast(colours[shape], colours["page"]) >= (2.4 if shape == "wait" else 3), shape


def test_every_colour_is_there_and_used() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", STYLE)) == set(LIGHT)
    assert len(set(DASHES)) == SERIES
