from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.commands.top.rates import _ITL, _TTFT, SPAN_S, Counts, Window, column, counts_in, quantile
from pdctl.proxy.telemetry import metrics

SCRAPE = """# HELP pdctl_proxy_requests_total Requests by HTTP status
# TYPE pdctl_proxy_requests_total counter
pdctl_proxy_requests_total{status="200"} 90.0
pdctl_proxy_requests_total{status="429"} 6.0
pdctl_proxy_requests_total{status="502"} 4.0
# TYPE pdctl_proxy_tokens_total counter
pdctl_proxy_tokens_total 1500.0
# TYPE pdctl_proxy_ttft_seconds histogram
pdctl_proxy_ttft_seconds_bucket{le="0.1"} 50.0
pdctl_proxy_ttft_seconds_bucket{le="0.2"} 90.0
pdctl_proxy_ttft_seconds_bucket{le="+Inf"} 90.0
pdctl_proxy_ttft_seconds_count 90.0
pdctl_proxy_ttft_seconds_sum 9.0
# TYPE pdctl_proxy_waiting gauge
pdctl_proxy_waiting 3.0
"""


def test_a_scrape() -> None:
    found = counts_in(SCRAPE)
    assert found[:5] == (100.0, 4.0, 6.0, 1500.0, 3.0)
    assert found.ttft == {0.1: 50.0, 0.2: 90.0, float("inf"): 90.0}
    assert found.itl == {}
    with pytest.raises(ValueError):
        counts_in("<html>\nnot metrics {")


def test_the_names_are_the_proxys() -> None:
    named = {name for name, *_ in (*metrics._COUNTERS.values(), *metrics._HISTOGRAMS.values())}
    assert {line.split()[2] for line in SCRAPE.splitlines() if "TYPE" in line} - {"pdctl_proxy_waiting"} <= {
        *named, *(f"{name}_total" for name in named),
    }  # fmt: skip
    assert {_TTFT, _ITL} <= named


def counts(requests: float, ttft: dict[float, float] | None = None, failed: float = 0.0) -> Counts:
    return Counts(requests, failed, 0.0, requests * 10, 2.0, ttft or {}, {})


def test_rates_over_the_last_seconds() -> None:
    window = Window()
    assert window.rates(100.0, counts(1000)) is None, "one scrape is no rate"
    first = window.rates(101.0, counts(1004, {0.1: 4.0, float("inf"): 4.0}, failed=1))
    assert first is not None
    assert (first.requests, first.failed, first.tokens, first.waiting) == (4.0, 1.0, 40.0, 2)
    assert first.ttft_p50 == pytest.approx(0.05)
    assert first.itl_p50 is None
    for second in range(2, 60):
        last = window.rates(100.0 + second, counts(1004, {0.1: 4.0, float("inf"): 4.0}))
    assert last is not None
    assert (last.requests, last.ttft_p50) == (0.0, None), f"what was longer ago than {SPAN_S} s does not count"


def test_a_proxy_that_restarts_begins_anew() -> None:
    window = Window()
    window.rates(0.0, counts(1000))
    window.rates(1.0, counts(1010))
    assert window.rates(2.0, counts(3)) is None
    again = window.rates(3.0, counts(5))
    assert again is not None
    assert again.requests == 2.0


def test_a_worker_that_knows_a_little_less_is_no_restart() -> None:
    window = Window()
    window.rates(0.0, counts(1000))
    found = window.rates(1.0, counts(998))
    assert found is not None
    assert found.requests == 0.0


def test_quantiles() -> None:
    inf = float("inf")
    assert quantile([(0.1, 10.0), (0.2, 20.0), (inf, 20.0)], 0.5) == pytest.approx(0.1)
    assert quantile([(0.1, 10.0), (0.2, 20.0), (inf, 20.0)], 0.75) == pytest.approx(0.15)
    assert quantile([(0.1, 0.0), (0.2, 0.0), (inf, 5.0)], 0.5) == 0.2, "the last bound that is known"
    assert quantile([(0.1, 0.0), (inf, 0.0)], 0.5) is None
    assert quantile([], 0.5) is None


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_of_its_value(values: list[float], part: float) -> None:
    bounds = [0.5, 1.0, 2.0, 5.0, 10.0, float("inf")]
    buckets = [(bound, float(sum(value <= bound for value in values))) for bound in bounds]
    found = quantile(buckets, part)
    assert found is not None
    wanted = sorted(values)[max(0, -(-int(part * len(values) * 1000) // 1000) - 1)]
    at = next(place for place, bound in enumerate(bounds) if wanted <= bound)
    assert found <= bounds[at] + 1e-9


def test_a_column() -> None:
    window = Window()
    window.rates(0.0, counts(0))
    rates = window.rates(1.0, counts(5))
    assert column([None, rates], "requests") == [None, 5.0]
