"""The engine's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest

from pdctl.engine.front.handover.lease_desk import LeaseDesk
from pdctl.engine.ipc.messages import TierBooks
from pdctl.latency import KINDS, Work
from pdctl.wire import EngineState

# Creation times are meaningless: the counters are created at each scrape.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the package has no type for this

# Begins the names of counters of steps, by whether the next one was scheduled ahead.
AHEAD = "ahead_"
# Counters of tiers are called by the tier and what is counted, `host_stored`.
_TIERS = ("host", "store")
_TIER_GAUGES = {
    "unavailable": "1 while the tier cannot be used",
    "blocks": "KV blocks that are in the tier",
}
_TIER_COUNTERS = {
    "stored": "KV blocks copied to the tier",
    "refused": "KV blocks that the tier did not take",
    "dropped": "KV blocks that were given up before they were copied to the tier",
    "loaded": "KV blocks read from the tier",
    "wrong": "KV blocks of the tier that were not what they should be, and were computed",
}


def render_metrics(state: EngineState, leases: LeaseDesk, quarantined_block_s: float) -> bytes:
    """All metrics, built from the current counts at each scrape, so that nothing has to be kept in sync."""
    registry = CollectorRegistry()
    for name, (what, value) in _gauges(state).items():
        Gauge(name, what, registry=registry).set(value)
    for name, (what, amount) in {**_counters(state), **_shared(state.counters)}.items():
        Counter(name, what, registry=registry).inc(amount)
    _ahead(state.counters, registry)
    _tiers(state.counters, registry)
    if state.work is not None:
        _predictions(state.work, registry)
    _leases(leases, quarantined_block_s, registry)
    return generate_latest(registry)


def _gauges(state: EngineState) -> dict[str, tuple[str, float]]:
    return {
        "pdctl_engine_blocks": ("KV blocks in the pool", state.blocks_total),
        "pdctl_engine_blocks_free": ("KV blocks free", state.blocks_free),
        "pdctl_engine_blocks_cached": (
            "Free KV blocks kept for prompts with the same beginning",
            state.blocks_cached,
        ),
        "pdctl_engine_blocks_leased": ("KV blocks held for decode engines", state.blocks_leased),
        "pdctl_engine_blocks_quarantined": (
            "KV blocks that a late transfer may still write to",
            state.blocks_quarantined,
        ),
        "pdctl_engine_requests_held_back": (
            "Prefills waiting for leased blocks to come free",
            state.held_back,
        ),
        "pdctl_engine_blocks_reserved": (
            "KV blocks set aside for KV that is being pulled",
            state.blocks_reserved,
        ),
        "pdctl_engine_requests_running": ("Requests being computed", state.running),
        "pdctl_engine_requests_waiting": ("Requests waiting for blocks or budget", state.waiting),
    }


def _counters(state: EngineState) -> dict[str, tuple[str, float]]:
    return {
        "pdctl_engine_tokens": ("Tokens generated", state.tokens_total),
        "pdctl_engine_prefix_tokens": ("Tokens of prompts", state.counters["prefix_tokens"]),
        "pdctl_engine_prefix_hits": ("Tokens of prompts whose KV was there already", state.counters["prefix_hits"]),
        "pdctl_engine_prompts_own": (
            "Prompts computed here for answers from here",
            state.counters["prompts_own"],
        ),
        "pdctl_engine_prompts_received": (
            "Prompts whose KV came from a prefill engine",
            state.counters["prompts_received"],
        ),
        "pdctl_engine_drafted_tokens": ("Guessed tokens that were verified", state.counters["drafted"]),
        "pdctl_engine_accepted_tokens": ("Guessed tokens that were right", state.counters["accepted"]),
        "pdctl_engine_hand_overs": ("Hand-overs certified", state.transfers["hand_overs"]),
        "pdctl_engine_pulls": ("KV pulls completed", state.transfers["pulls"]),
        "pdctl_engine_pulls_lost": ("Hand-overs lost and prefilled again", state.transfers["lost"]),
        "pdctl_engine_pulls_early": ("Hand-overs read while their prefill still computed", state.transfers["early"]),
        "pdctl_engine_pulled_bytes": ("KV bytes pulled", state.transfers["bytes"]),
        "pdctl_engine_pulled_seconds": ("Seconds spent copying KV", state.transfers["seconds"]),
        "pdctl_engine_hand_over_seconds": (
            "Seconds from a hand-over's arrival to its certified KV",
            state.transfers["hand_over_seconds"],
        ),
    }


def _shared(counters: dict[str, int]) -> dict[str, tuple[str, float]]:
    """Of engines that fetch and lend beginnings of prompts, or have tiers."""
    told = {
        "prefixes_fetched": "Beginnings of prompts whose KV was fetched from another engine",
        "prefix_tokens_fetched": "Tokens of these, which were not computed",
        "prefixes_lost": "Beginnings of prompts whose KV did not come in time, and that were computed",
        "prefixes_lent": "Beginnings of prompts whose KV was lent to another engine",
        "tier_prefixes": "Beginnings of prompts whose KV was read from a tier",
        "tier_prefix_tokens": "Tokens of these, which were not computed",
        "tier_loads_lost": "Beginnings of prompts whose KV did not come from a tier in time, and that were computed",
    }
    return {f"pdctl_engine_{name}": (what, counters[name]) for name, what in told.items() if name in counters}


def _leases(leases: LeaseDesk, quarantined_block_s: float, registry: CollectorRegistry) -> None:
    leased, leaked = leases.block_seconds()
    block_seconds = Counter(
        "pdctl_engine_block_seconds",
        "KV blocks times seconds: leased, of these leaked (held for a holder that was gone), and quarantined",
        ["what"],
        registry=registry,
    )
    for what, amount in (("leased", leased), ("leaked", leaked), ("quarantined", quarantined_block_s)):
        block_seconds.labels(what).inc(amount)
    ended = Counter("pdctl_engine_leases_ended", "Leases ended, by how", ["how"], registry=registry)
    for how, count in leases.table.ended.items():
        ended.labels(how.value).inc(count)


def _ahead(counters: dict[str, int], registry: CollectorRegistry) -> None:
    results = Counter(
        "pdctl_engine_ahead",
        "Steps by whether the next one was scheduled and launched while they computed (launched), or why not",
        ["result"],
        registry=registry,
    )
    for name, count in counters.items():
        if name.startswith(AHEAD):
            results.labels(name.removeprefix(AHEAD)).inc(count)


def tier_counters(tiers: list[TierBooks]) -> dict[str, int]:
    """The counts of all tiers, by name."""
    found = {}
    for tier in tiers:
        found[f"{tier.name}_unavailable"] = int(not tier.is_there)
        for what in ("blocks", *_TIER_COUNTERS):
            found[f"{tier.name}_{what}"] = getattr(tier, what)
    return found


def _tiers(counters: dict[str, int], registry: CollectorRegistry) -> None:
    tiers = [tier for tier in _TIERS if f"{tier}_stored" in counters]
    if not tiers:
        return
    for what, text in _TIER_GAUGES.items():
        gauge = Gauge(f"pdctl_engine_tier_{what}", text, ["tier"], registry=registry)
        for tier in tiers:
            gauge.labels(tier).set(counters[f"{tier}_{what}"])
    for what, text in _TIER_COUNTERS.items():
        total = Counter(f"pdctl_engine_tier_{what}", text, ["tier"], registry=registry)
        for tier in tiers:
            total.labels(tier).inc(counters[f"{tier}_{what}"])


def _predictions(work: Work, registry: CollectorRegistry) -> None:
    """Steps by kind: how long they took, and how long the latency model had predicted."""
    steps = Counter("pdctl_engine_steps", "Steps with a predicted duration", ["kind"], registry=registry)
    actual = Counter("pdctl_engine_step_seconds", "Seconds that these steps took", ["kind"], registry=registry)
    predicted = Counter(
        "pdctl_engine_step_predicted_seconds", "Seconds that the latency model predicted", ["kind"], registry=registry
    )
    errors = Counter(
        "pdctl_engine_step_errors", "Sum of the relative errors of these predictions", ["kind"], registry=registry
    )
    for kind, accuracy in zip(KINDS, work.accuracy, strict=True):
        steps.labels(kind).inc(accuracy.steps)
        actual.labels(kind).inc(accuracy.actual_s)
        predicted.labels(kind).inc(accuracy.predicted_s)
        errors.labels(kind).inc(accuracy.error)
