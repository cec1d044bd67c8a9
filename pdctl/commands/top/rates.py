"""What clients get: rates and latencies of the last seconds, from two scrapes of the proxy's `/metrics`. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Rates and percentiles cover this many seconds.
SPAN_S = 15.0
_TTFT, _ITL = "pdctl_proxy_ttft_seconds", "pdctl_proxy_itl_seconds"


class Counts(NamedTuple):
    """The proxy's counts since its start. `ttft`, `itl`: observations up to each bound, by bound in seconds."""

    requests: float = 0.0
    failed: float = 0.0
    refused: float = 0.0
    tokens: float = 0.0
    waiting: float = 0.0
    ttft: dict[float, float] = {}  # noqa: RUF012 - a default that nobody changes
    itl: dict[float, float] = {}  # noqa: RUF012


class Rates(NamedTuple):
    """Per second, and seconds. None: nothing was observed."""

    requests: float
    failed: float
    refused: float
    tokens: float
    waiting: int
    ttft_p50: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p99: float | None


def counts_in(text: str) -> Counts:
    """The counts in a scrape. Raises ValueError if it is none."""
    from prometheus_client.parser import text_string_to_metric_families

    found = {"requests": 0.0, "failed": 0.0, "refused": 0.0, "tokens": 0.0, "waiting": 0.0}
    histograms: dict[str, dict[float, float]] = {_TTFT: {}, _ITL: {}}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.name in histograms and sample.name.endswith("_bucket"):
                histograms[family.name][float(sample.labels["le"])] = sample.value
            elif sample.name == "pdctl_proxy_requests_total":
                found["requests"] += sample.value
                found["failed"] += sample.value if sample.labels.get("status", "").startswith("5") else 0.0
                found["refused"] += sample.value if sample.labels.get("status") == "429" else 0.0
            elif sample.name == "pdctl_proxy_tokens_total":
                found["tokens"] = sample.value
            elif sample.name == "pdctl_proxy_waiting":
                found["waiting"] = sample.value
    return Counts(**found, ttft=histograms[_TTFT], itl=histograms[_ITL])


class Window:
    """The scrapes of the last SPAN_S seconds."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, Counts]] = deque()

    def rates(self, at: float, counts: Counts) -> Rates | None:
        """The rates up to this scrape. `at`: seconds of a monotonic clock. None for the first one."""
        if self._kept and _has_restarted(self._kept[-1][1], counts):
            self._kept.clear()
        self._kept.append((at, counts))
        while len(self._kept) > 2 and self._kept[1][0] <= at - SPAN_S:
            self._kept.popleft()
        begin, before = self._kept[0]
        return _between(before, counts, at - begin) if at > begin else None


def _has_restarted(before: Counts, now: Counts) -> bool:
    """Whether the counts began anew. With several workers they may be a little less than before, too: each knows the
    others' counts of a second ago."""
    return now.requests < before.requests / 2 or now.tokens < before.tokens / 2


def _between(before: Counts, now: Counts, seconds: float) -> Rates:
    ttft, itl = _more(before.ttft, now.ttft), _more(before.itl, now.itl)
    return Rates(
        requests=max(0.0, now.requests - before.requests) / seconds,
        failed=max(0.0, now.failed - before.failed) / seconds,
        refused=max(0.0, now.refused - before.refused) / seconds,
        tokens=max(0.0, now.tokens - before.tokens) / seconds,
        waiting=int(now.waiting),
        ttft_p50=quantile(ttft, 0.5),
        ttft_p99=quantile(ttft, 0.99),
        itl_p50=quantile(itl, 0.5),
        itl_p99=quantile(itl, 0.99),
    )


def _more(before: dict[float, float], now: dict[float, float]) -> list[tuple[float, float]]:
    """What was observed between two scrapes: up to each bound, in order, never decreasing."""
    found, most = [], 0.0
    for bound in sorted(now):
        most = max(most, now[bound] - before.get(bound, 0.0))
        found.append((bound, most))
    return found


def quantile(buckets: Sequence[tuple[float, float]], part: float) -> float | None:
    """A quantile of a histogram, linear within its bucket, as Prometheus' histogram_quantile does. `buckets`: bound and
    number of observations up to it. Above the last finite bound, that bound. None without observations."""
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank, below, counted = part * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > counted:
            return below if bound == float("inf") else below + (bound - below) * (rank - counted) / (count - counted)
        below, counted = bound, count
    return below


def column(history: Iterable[Rates | None], name: str) -> list[float | None]:
    """One field of each; None where it is unknown."""
    return [None if rates is None else getattr(rates, name) for rates in history]
