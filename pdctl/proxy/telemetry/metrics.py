"""The proxy's metrics and their Prometheus export. Times are in seconds.

docs/metrics.md lists every name. For dashboards made for vLLM, metrics with the same meaning are also exported under
vLLM's names, at a separate path because Prometheus' linter refuses their colons."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pdctl.net.openai.api import Counts
from pdctl.proxy.client.keys import ANYONE
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.inline import Why
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.shares.fair_queue import FairQueue
from pdctl.proxy.takeover.cover import CoverCounts
from pdctl.proxy.telemetry.counters import Counters, Histogram, Key
from pdctl.proxy.telemetry.timing import Timing

_log = logging.getLogger(__name__)

_LONG = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# Counters of an API key, and the fields of KeyUse that have them.
KEY_COUNTERS = {
    "key_requests": "requests", "key_refused": "refused", "key_prompt_tokens": "prompt_tokens",
    "key_cached_tokens": "cached_tokens", "key_tokens": "output_tokens", "key_queue": "queue_s", "key_ttft": "ttft_s",
    "key_first_tokens": "first_tokens",
}  # fmt: skip
# Maximum age of other workers' counts in a scrape, seconds.
SAVE_S = 1.0

_HISTOGRAMS = {
    "ttft": ("pdctl_proxy_ttft_seconds", "Time to first token", _LONG),
    "tpot": ("pdctl_proxy_tpot_seconds", "Mean time per output token after the first", _SHORT),
    "itl": ("pdctl_proxy_itl_seconds", "Time between tokens of a stream", _SHORT),
    "e2e": ("pdctl_proxy_request_seconds", "Time from request to end of answer", _LONG),
    "queue": ("pdctl_proxy_queue_seconds", "Time a request waited for admission", _LONG),
}
_COUNTERS = {
    "requests": ("pdctl_proxy_requests", "Requests by HTTP status", ("status",)),
    "tokens": ("pdctl_proxy_tokens", "Output tokens relayed", ()),
    "prompt_tokens": ("pdctl_proxy_prompt_tokens", "Prompt tokens of answered requests", ()),
    "slo_met": ("pdctl_proxy_slo_met", "Requests that met a target", ("target",)),
    "failovers": ("pdctl_proxy_failovers", "Requests that failed over from this engine", ("engine",)),
    "moved": ("pdctl_proxy_streams_moved", "Streams that went on from this engine at another one", ("engine",)),
    "hand_overs": ("pdctl_proxy_hand_overs", "Requests decoded from handed-over KV", ("prefill", "decode")),
    "hand_over_seconds": (
        "pdctl_proxy_hand_over_seconds", "Time that decode engines spent fetching KV", ("prefill", "decode"),
    ),
    "hand_over_bytes": ("pdctl_proxy_hand_over_bytes", "Bytes of KV handed over", ("prefill", "decode")),
    "placed": (
        "pdctl_proxy_prompts_placed",
        'Prompts by why they were computed inline by this decode engine; "remote": by a prefill engine',
        ("engine", "why"),
    ),
    "resumed": ("pdctl_proxy_resumed", "Answers begun by a proxy that died, and continued by this one", ()),
    "connections": (
        "pdctl_proxy_connections", "Connections by whether they would outlive the proxy", ("cover",),
    ),
    "covers_lost": (
        "pdctl_proxy_covers_lost", "Requests and answers that did not fit into a slot", (),
    ),
    "adopted": (
        "pdctl_proxy_adopted",
        "What became of connections of the proxy before: connections, resumed, repeated or cut", ("what",),
    ),
    "resent": ("pdctl_proxy_resent_bytes", "Bytes sent for the proxy before", ()),
    "sheds": ("pdctl_proxy_sheds", "Requests refused with 429", ("reason",)),
    "key_requests": ("pdctl_proxy_key_requests", "Requests by API key and HTTP status", ("key", "status")),
    "key_refused": ("pdctl_proxy_key_refused", "Requests of an API key refused with 429", ("key", "reason")),
    "key_prompt_tokens": ("pdctl_proxy_key_prompt_tokens", "Prompt tokens of an API key", ("key",)),
    "key_cached_tokens": ("pdctl_proxy_key_cached_tokens", "Those found in a prefix cache", ("key",)),
    "key_tokens": ("pdctl_proxy_key_tokens", "Output tokens of an API key", ("key",)),
    "key_queue": ("pdctl_proxy_key_queue_seconds", "Time that requests of an API key waited for admission", ("key",)),
    "key_ttft": ("pdctl_proxy_key_ttft_seconds", "Sum of the times to first token of an API key", ("key",)),
    "key_first_tokens": ("pdctl_proxy_key_first_tokens", "Number of these times", ("key",)),
    "ignored_fields": ("pdctl_proxy_ignored_fields", "Request fields dropped because no engine knows them", ("field",)),
    "left": ("pdctl_proxy_clients_left", "Requests whose client left before the end", ()),
    "quarantined": ("pdctl_proxy_quarantined", "Requests put in quarantine", ()),
    "release_failures": (
        "pdctl_proxy_release_failures", "Leases that could not be released and expire", (),
    ),
}  # fmt: skip
# vLLM's names of metrics with the same meaning, with its label.
_AS_VLLM = {
    "ttft": "vllm:time_to_first_token_seconds",
    "itl": "vllm:inter_token_latency_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",
    "e2e": "vllm:e2e_request_latency_seconds",
    "queue": "vllm:request_queue_time_seconds",
    "tokens": "vllm:generation_tokens",
    "prompt_tokens": "vllm:prompt_tokens",
}

# Keys of counters that every request updates.
_ANSWERED: Key = ("requests", ("200",))
_TOKENS: Key = ("tokens", ())
_PROMPT_TOKENS: Key = ("prompt_tokens", ())
_TTFT_MET: Key = ("slo_met", ("ttft",))
_TPOT_MET: Key = ("slo_met", ("tpot",))


@dataclass(slots=True)
class Metrics:
    """Counted by relays, rendered on request. `folder`: where workers save their counts, None for a single worker."""

    model: str
    ttft_slo_s: float
    tpot_slo_s: float
    folder: Path | None = None
    worker: str = "proxy"
    covers: CoverCounts | None = None
    counters: Counters = None  # type: ignore[assignment]  # made below
    _cannot_save: bool = False

    def __post_init__(self) -> None:
        self.counters = Counters({name: Histogram(bounds) for name, (_, _, bounds) in _HISTOGRAMS.items()})

    @property
    def gaps(self) -> Histogram:
        """Time between tokens."""
        return self.counters.histograms["itl"]

    def finished(self, timing: Timing, prompt_tokens: int, tokens: int) -> None:
        """A request was answered completely."""
        now, counters, histograms = time.monotonic(), self.counters.values, self.counters.histograms
        counters[_ANSWERED] += 1
        counters[_TOKENS] += tokens
        counters[_PROMPT_TOKENS] += prompt_tokens
        first = timing.first_token_at or now
        ttft, tpot = first - timing.received_at, (now - first) / max(1, tokens - 1)
        histograms["ttft"].add(ttft)
        histograms["tpot"].add(tpot)
        histograms["e2e"].add(now - timing.received_at)
        histograms["queue"].add(timing.admitted_at - timing.received_at)
        counters[_TTFT_MET] += ttft <= self.ttft_slo_s
        counters[_TPOT_MET] += tpot <= self.tpot_slo_s

    def placed(self, inline: tuple[str, Why] | None) -> None:
        """A prompt was sent to a pair, or to a decode engine alone: its name, and why."""
        self.counters.count("placed", *(("", "remote") if inline is None else inline))

    def failed(self, status: int) -> None:
        """A request was answered with an error."""
        self.counters.count("requests", str(status))

    def failed_over(self, engine: str) -> None:
        """A request failed over from an engine."""
        self.counters.count("failovers", engine)

    def moved(self, engine: str) -> None:
        """A stream went on from an engine at another one."""
        self.counters.count("moved", engine)

    def resumed(self) -> None:
        """An answer that another proxy began goes on here."""
        self.counters.count("resumed")

    def shed(self, reason: str, key: str = ANYONE) -> None:
        """A request was refused with 429."""
        self.counters.count("sheds", reason)
        if key != ANYONE:
            self.counters.count("key_refused", key, reason)

    def of_key(self, key: str, status: int, counts: Counts, timing: Timing) -> None:
        """A request of an API key is over. `key`: its name."""
        values = self.counters.values
        values["key_requests", (key, str(status))] += 1
        values["key_prompt_tokens", (key,)] += counts.prompt
        values["key_cached_tokens", (key,)] += counts.cached
        values["key_tokens", (key,)] += counts.completion
        if timing.admitted_at:
            values["key_queue", (key,)] += timing.admitted_at - timing.received_at
        if timing.first_token_at:
            values["key_ttft", (key,)] += timing.first_token_at - timing.received_at
            values["key_first_tokens", (key,)] += 1

    def ignored(self, field: str) -> None:
        """A request had a field that no engine knows."""
        self.counters.count("ignored_fields", field)

    def client_left(self) -> None:
        """A client disconnected before the end."""
        self.counters.count("left")

    def handed_over(self, prefill: str, decode: str, timing: Timing) -> None:
        """A request was decoded from handed-over KV."""
        self.counters.count("hand_overs", prefill, decode)
        if timing.stages:
            self.counters.count("hand_over_seconds", prefill, decode, by=timing.stages.get("hand_over", 0.0))
            self.counters.count("hand_over_bytes", prefill, decode, by=timing.stages.get("bytes", 0.0))

    def _note_covers(self) -> None:
        if self.covers is not None:
            values, found, before = self.counters.values, self.covers, self.covers.taken_over
            values["connections", ("covered",)] = float(found.covered)
            values["connections", ("uncovered",)] = float(found.uncovered)
            values["covers_lost", ()] = float(found.lost)
            values["adopted", ("connections",)] = float(before.connections)
            values["adopted", ("resumed",)] = float(before.resumed)
            values["adopted", ("repeated",)] = float(before.repeated)
            values["adopted", ("cut",)] = float(before.cut)
            values["resent", ()] = float(before.resent)

    def save(self) -> None:
        """Save the counts for the other workers."""
        self._note_covers()
        if self.folder is None:
            return
        try:
            self.counters.save(self.folder / f"{self.worker}.json")
            self._cannot_save = False
        except OSError as failure:
            # A full disk: the proxy serves, and the next save has everything.
            if not self._cannot_save:
                _log.warning("the counts cannot be saved for other workers: %s", failure)
            self._cannot_save = True

    def render(
        self,
        pool: EnginePool,
        queue: FairQueue,
        quarantined: int,
        release_failures: int,
        as_vllm: bool = False,
    ) -> bytes:
        """Prometheus text with the totals of all workers; `as_vllm`: under vLLM's names."""
        self._note_covers()
        self.counters.values["quarantined", ()] = float(quarantined)
        self.counters.values["release_failures", ()] = float(release_failures)
        counters = self.counters
        if self.folder is not None:
            ours = self.folder / f"{self.worker}.json"
            counters = counters.with_others(path for path in self.folder.glob("*.json") if path != ours)
        registry = CollectorRegistry()
        registry.register(
            _AsVllm(self.model, counters, pool, queue.requests) if as_vllm else _Native(counters, pool, queue)
        )
        return generate_latest(registry)


class _Native(Collector):
    """One scrape under pdctl's names."""

    def __init__(self, counters: Counters, pool: EnginePool, queue: FairQueue) -> None:
        self._counters = counters
        self._pool = pool
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        for short, (name, about, labels) in _COUNTERS.items():
            family = CounterMetricFamily(name, about, labels=labels)
            for key, value in sorted(_values(self._counters, short, bool(labels)).items()):
                family.add_metric(key, value)
            yield family
        for short, (name, about, _) in _HISTOGRAMS.items():
            yield _family(name, about, [], [], self._counters.histograms[short])
        yield from self._engines()
        yield GaugeMetricFamily("pdctl_proxy_waiting", "Requests waiting for admission", value=self._queue.requests)
        yield from self._keys()

    def _keys(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("pdctl_proxy_key_running", "Answers of an API key in progress", labels=["key"])
        waiting = GaugeMetricFamily("pdctl_proxy_key_waiting", "Answers of an API key that wait", labels=["key"])
        for name, key in self._queue.states().items():
            if name != ANYONE:
                running.add_metric([name], key.running)
                waiting.add_metric([name], key.waiting)
        yield from (running, waiting)

    def _engines(self) -> Iterator[Metric]:
        gauges: dict[str, tuple[str, Callable[[Engine], float]]] = {
            "pdctl_proxy_engine_healthy": ("1 if the engine is available", lambda e: float(e.healthy)),
            "pdctl_proxy_engine_requests": ("Calls in progress at the engine", lambda e: float(len(e.tickets))),
            "pdctl_proxy_engine_breaker_open": (
                "1 if the circuit breaker is open: the engine gets no requests for a while",
                lambda e: float(e.breaker.state != "closed"),
            ),
            "pdctl_proxy_engine_draining": ("1 if the engine gets no new requests", lambda e: float(e.draining)),
        }  # fmt: skip
        for name, (about, value_of) in gauges.items():
            family = GaugeMetricFamily(name, about, labels=["engine"])
            for engine in self._pool.engines:
                family.add_metric([engine.name], value_of(engine))
            yield family
        info = GaugeMetricFamily("pdctl_proxy_engine_info", "Always 1", labels=["engine", "kind", "role"])
        for engine in self._pool.engines:
            info.add_metric([engine.name, engine.address.kind, engine.address.role], 1.0)
        yield info


class _AsVllm(Collector):
    """One scrape under vLLM's names, with its label."""

    def __init__(self, model: str, counters: Counters, pool: EnginePool, waiting: int) -> None:
        self._model = model
        self._counters = counters
        self._running = sum(len(engine.tickets) for engine in pool.engines)
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        """Metrics with the same meaning in vLLM."""
        labels, values = ["model_name"], [self._model]
        for short, name in _AS_VLLM.items():
            if short in _HISTOGRAMS:
                yield _family(name, _HISTOGRAMS[short][1], labels, values, self._counters.histograms[short])
            else:
                family = CounterMetricFamily(name, _COUNTERS[short][1], labels=labels)
                family.add_metric(values, _values(self._counters, short, labelled=False)[()])
                yield family
        for name, about, value in (
            ("vllm:num_requests_running", "Requests running on engines", self._running),
            ("vllm:num_requests_waiting", "Requests waiting for admission", self._waiting),
        ):
            gauge = GaugeMetricFamily(name, about, labels=labels)
            gauge.add_metric(values, value)
            yield gauge


def _values(counters: Counters, counter: str, labelled: bool) -> dict[tuple[str, ...], float]:
    found = {labels: value for (name, labels), value in counters.values.items() if name == counter}
    return found if labelled else {(): 0.0, **found}


def _family(name: str, about: str, labels: list[str], values: list[str], histogram: Histogram) -> Metric:
    buckets, observed = [], 0
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
        observed += count
        buckets.append((bound, float(observed)))
    family = HistogramMetricFamily(name, about, labels=labels)
    family.add_metric(values, buckets, histogram.total)
    return family
