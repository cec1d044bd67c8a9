"""The samples behind the charts: in order, bounded in number and bytes, and a day of them averages what was there."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.supervisor.dashboard.history import (
    ENGINE_COLUMNS,
    FULL_KEPT,
    MOST_BYTES,
    MOST_ENGINES,
    SERVICE_COLUMNS,
    THIN_KEPT,
    THIN_S,
    History,
    Ring,
)

NAMES = ("a", "b", "c", "d")
steps = st.lists(
    st.tuples(
        st.floats(0.01, 100.0),
        st.dictionaries(st.sampled_from(NAMES), st.floats(-1e6, 1e6, width=32), max_size=len(NAMES)),
    ),
    max_size=60,
)


@given(steps, st.integers(1, 20), st.integers(1, 4))
def test_a_ring_has_the_newest_samples_in_order(
    added: list[tuple[float, dict[str, float]]], capacity: int, columns: int
) -> None:
    ring, at, known = Ring(capacity, columns), 0.0, []
    for gap, values in added:
        at += gap
        ring.add(at, values)
        ring.audit()
        known.append((at, values))
    kept = known[-capacity:]
    found = ring.table(-1.0, capacity)
    assert found["at"] == [round(at, 3) for at, _ in kept]
    for name in found.keys() - {"at"}:
        assert len(found[name]) == len(kept)
        for value, (_, values) in zip(found[name], kept, strict=True):
            assert value is None or value == pytest.approx(values[name], abs=1e-3, rel=1e-6)
    assert ring.oldest == (kept[0][0] if kept else None)


@given(steps)
def test_with_room_for_every_column_nothing_is_lost(added: list[tuple[float, dict[str, float]]]) -> None:
    ring, at, known = Ring(10, len(NAMES)), 0.0, []
    for gap, values in added:
        at += gap
        ring.add(at, values)
        known.append(values)
    found = ring.table(-1.0, 10)
    for name in NAMES:
        wanted = [values.get(name) for values in known[-10:]]
        assert found.get(name, [None] * len(wanted)) == [
            None if value is None else pytest.approx(value, abs=1e-3, rel=1e-6) for value in wanted
        ]


@given(st.integers(1, 300), st.integers(1, 50))
def test_a_thinned_table_has_the_newest_sample(count: int, most: int) -> None:
    ring = Ring(300)
    for number in range(count):
        ring.add(float(number + 1), {"a": float(number)})
    found = ring.table(0.0, most)
    assert 1 <= len(found["at"]) <= most
    assert found["at"][-1] == float(count)
    assert found["a"][-1] == float(count - 1)


def test_samples_that_are_not_newer_are_a_fault() -> None:
    ring = Ring(3)
    ring.add(2.0, {})
    with pytest.raises(AssertionError, match="in order"):
        ring.add(2.0, {})


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0.2, 30.0), st.floats(0, 1000)), min_size=1, max_size=200))
def test_a_day_is_averages(samples: list[tuple[float, float]]) -> None:
    history, at = History(), 0.0
    by_bucket: dict[int, list[float]] = {}
    for gap, value in samples:
        at += gap
        history.add(at, {"a": value, "unknown": math.nan})
        history.audit()
        by_bucket.setdefault(int(at // THIN_S), []).append(value)
    # The last bucket is not over yet.
    by_bucket.popitem()
    thin = history._thin.table(-1.0, THIN_KEPT)
    assert thin["at"] == [(bucket + 0.5) * THIN_S for bucket in by_bucket]
    means = [sum(values) / len(values) for values in by_bucket.values()]
    assert thin.get("a", []) == pytest.approx(means, abs=1e-2, rel=1e-5)
    assert "unknown" not in thin


def test_a_day_of_a_small_service_at_full_rate() -> None:
    history = History()
    for second in range(24 * 3600):
        history.add(1e9 + second, {"tokens_s": float(second % 100), "prefill-0/kv": 0.5, "decode-0/kv": 0.25})
    history.audit()
    assert history.size < 10**6
    now = 1e9 + 24 * 3600 - 1
    assert len(history.after(0.0)["at"]) == FULL_KEPT
    minutes = history.span(now, 900, 900)["at"]
    assert (minutes[0], minutes[-1], len(minutes)) == (now - 899, now, 900)
    day = history.span(now, 24 * 3600, 900)
    assert 800 <= len(day["at"]) <= 900
    first, last = day["at"][0], day["at"][-1]
    assert first is not None
    assert last is not None
    assert last - first > 23.9 * 3600
    assert day["tokens_s"] == pytest.approx([49.5] * len(day["at"]), abs=46)


def test_the_largest_service_has_its_bound() -> None:
    history = History()
    columns = [f"engine-{engine}/{column}" for engine in range(2 * MOST_ENGINES) for column in ("kv", "run", "wait")]
    for second in (1.0, 2.0, 20.0):
        history.add(second, dict.fromkeys(columns, 1.0))
    history.audit()
    assert len(history.after(0.0)) == SERVICE_COLUMNS + ENGINE_COLUMNS * MOST_ENGINES + 1
    assert 10**7 < history.size < MOST_BYTES


def test_engines_that_come_and_go_take_no_room_for_ever() -> None:
    ring = Ring(3, most_columns=2)
    for number in range(100):
        ring.add(float(number + 1), {f"{number // 10}/kv": float(number)})
        ring.audit()
    found = ring.table(0.0, 3)
    assert found["9/kv"] == [97.0, 98.0, 99.0]
