"""Rates, means and percentiles between two looks at a service."""

from __future__ import annotations

import math
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.control_api import KvStatus
from pdctl.proxy_wire import Counted, Figures
from pdctl.supervisor.dashboard.rates import Look, Rates, quantile
from pdctl.wire import EngineState

BOUNDS = [0.01, 0.1, 1.0]
NO_KV = KvStatus(engines=(), leases=(), unreachable={})


def counted(*values: float) -> Counted:
    counts = [0] * (len(BOUNDS) + 1)
    for value in values:
        counts[bisect_left(BOUNDS, value)] += 1
    return Counted(BOUNDS, counts, sum(values))


def figures(answered: float = 0, ttft: tuple[float, ...] = (), waiting: int = 0, tokens: float = 0) -> Figures:
    return Figures(answered, 0.0, tokens, 0.0, 0.0, waiting, counted(*ttft), counted())


def state(name: str, tokens: int, epoch: str = "0-1", free: int = 75) -> EngineState:
    return EngineState(
        name=name, role="decode", epoch=epoch, blocks_total=100, blocks_free=free, blocks_cached=0,
        blocks_referenced=100 - free, blocks_leased=0, blocks_quarantined=0, blocks_reserved=0, held_back=0, running=2,
        waiting=1, tokens_total=tokens, leases=[], links=[], transfers={},
    )  # fmt: skip


def look(*states: EngineState, **proxies: Figures) -> Look:
    return Look({one.name: one for one in states}, NO_KV, proxies)


def test_the_first_look_has_no_rates() -> None:
    values, engines = Rates().of(0.0, look(state("d", 100), proxy=figures(5, waiting=3)))
    assert values == {"waiting": 3.0, "d/kv": 0.25, "d/running": 2.0, "d/waiting": 1.0}
    assert engines["d"].tokens_s is None


def test_rates_are_per_second() -> None:
    rates = Rates()
    rates.of(0.0, look(state("d", 100), proxy=figures(5, (0.02,))))
    values, engines = rates.of(2.0, look(state("d", 150), proxy=figures(9, (0.02, 0.4, 0.6))))
    assert values["answered_s"] == 2.0
    assert values["ttft_mean"] == pytest.approx(0.5)
    assert values["tokens_s"] == engines["d"].tokens_s == 25.0
    assert math.isnan(values["itl_mean"])


def test_a_process_that_is_new_has_no_rate_at_first() -> None:
    rates = Rates()
    rates.of(0.0, look(state("d", 100), proxy=figures(5)))
    values, engines = rates.of(1.0, look(state("d", 90, epoch="0-2"), other=figures(1000)))
    assert engines["d"].tokens_s is None
    assert not {"answered_s", "tokens_s"} & values.keys()


def test_a_proxy_that_was_restarted_counts_from_zero() -> None:
    rates = Rates()
    rates.of(0.0, look(a=figures(100, (0.02,) * 50), b=figures(10)))
    values, _ = rates.of(1.0, look(a=figures(4, (0.2,)), b=figures(11)))
    assert values["answered_s"] == 5.0
    assert values["ttft_mean"] == pytest.approx(0.2)


def test_tokens_of_engines_that_tell_nothing_are_those_of_the_proxy() -> None:
    rates = Rates()
    rates.of(0.0, look(proxy=figures(tokens=10)))
    values, _ = rates.of(1.0, look(proxy=figures(tokens=40)))
    assert values["tokens_s"] == 30.0


def test_an_engine_that_does_not_answer_has_no_columns() -> None:
    values, engines = Rates().of(0.0, Look({"d": "timed out"}, NO_KV, {}))
    assert values == {}
    assert engines == {}


@given(st.lists(st.floats(0, 0.999), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_a_percentile_is_in_its_bucket(values: list[float], part: float) -> None:
    exact = sorted(values)[math.ceil(part * len(values)) - 1]
    found = quantile([counted(*values)], part)
    place = bisect_left(BOUNDS, exact)
    edges = [0.0, *BOUNDS]
    assert edges[place] <= found <= edges[place + 1] * (1 + 1e-9)


def test_a_percentile_of_nothing_is_unknown() -> None:
    assert math.isnan(quantile([], 0.95))
    assert math.isnan(quantile([counted()], 0.95))
    assert quantile([counted(5.0)], 0.95) == 1.0
