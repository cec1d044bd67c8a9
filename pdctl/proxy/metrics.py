"""The proxy's Prometheus metrics."""

from __future__ import annotations

import time

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from pdctl.proxy.pool import EnginePool

_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_TPOT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)

disable_created_metrics()  # type: ignore[no-untyped-call]  # the package is typed but for this


class Metrics:
    """Counted by relays, rendered on request. Times in seconds."""

    def __init__(self, ttft_slo_s: float, tpot_slo_s: float) -> None:
        self._slo = (ttft_slo_s, tpot_slo_s)
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter("pdctl_proxy_requests", "Requests by HTTP status", ["status"], registry=registry)
        self._ttft = Histogram(
            "pdctl_proxy_ttft_seconds", "Time to first token", buckets=_TTFT_BUCKETS, registry=registry
        )
        self._tpot = Histogram(
            "pdctl_proxy_tpot_seconds",
            "Mean time per output token after the first",
            buckets=_TPOT_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter("pdctl_proxy_tokens", "Output tokens relayed", registry=registry)
        self._slo_met = Counter("pdctl_proxy_slo_met", "Requests that met a target", ["target"], registry=registry)
        self._failovers = Counter(
            "pdctl_proxy_failovers",
            "Times a request went on after this engine failed it",
            ["engine"],
            registry=registry,
        )
        self._release_failures = Counter(
            "pdctl_proxy_release_failures",
            "Leases that could not be released and end by deadline",
            registry=registry,
        )
        self._hand_overs = Counter(
            "pdctl_proxy_hand_overs",
            "Requests handed from prefill to decode",
            ["prefill", "decode"],
            registry=registry,
        )
        self._hand_over_seconds = Counter(
            "pdctl_proxy_decode_seconds",
            "Seconds of decode after a hand-over",
            ["prefill", "decode"],
            registry=registry,
        )
        self._healthy = Gauge(
            "pdctl_proxy_engine_healthy", "1 when the engine can be used", ["engine"], registry=registry
        )
        self._inflight = Gauge("pdctl_proxy_engine_requests", "Requests at the engine", ["engine"], registry=registry)

    def finished(self, first_token_at: float, started_at: float, tokens: int) -> None:
        """A request was answered whole."""
        self._requests.labels("200").inc()
        self._tokens.inc(tokens)
        ttft = first_token_at - started_at
        tpot = (time.monotonic() - first_token_at) / max(1, tokens - 1)
        self._ttft.observe(ttft)
        self._tpot.observe(tpot)
        for target, value, limit in (("ttft", ttft, self._slo[0]), ("tpot", tpot, self._slo[1])):
            self._slo_met.labels(target).inc(value <= limit)

    def failed(self, status: int) -> None:
        """A request was answered with an error."""
        self._requests.labels(str(status)).inc()

    def failed_over(self, engine: str) -> None:
        """A request goes on elsewhere."""
        self._failovers.labels(engine).inc()

    def release_failed(self) -> None:
        """A lease could not be released."""
        self._release_failures.inc()

    def handed_over(self, prefill: str, decode: str, seconds: float) -> None:
        """A request was decoded from handed-over KV."""
        self._hand_overs.labels(prefill, decode).inc()
        self._hand_over_seconds.labels(prefill, decode).inc(seconds)

    def render(self, pool: EnginePool) -> bytes:
        """Prometheus text."""
        for engine in pool.engines:
            self._healthy.labels(engine.address.name).set(engine.healthy)
            self._inflight.labels(engine.address.name).set(len(engine.calls))
        return generate_latest(self.registry)
