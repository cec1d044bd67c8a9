"""Every metric that a service's /metrics has, with its labels, from the code that makes them."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import cast

import msgspec
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pdctl.engine.front.api.metrics import AHEAD, render_metrics
from pdctl.engine.front.handover.lease_desk import LeaseDesk
from pdctl.engine.handover.lease import LeaseState
from pdctl.host.devices.rdma import RdmaTree, Support
from pdctl.latency import StepTimes, Work
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.shares.fair_queue import FairQueue
from pdctl.proxy.telemetry.metrics import Metrics, _Native
from pdctl.proxy.telemetry.scrape import _Round
from pdctl.proxy.telemetry.service_metrics import Status, of_ports, of_status
from pdctl.wire import EngineState

# What Prometheus adds.
ADDED = {"service", "job", "instance"}
# Metrics of other kinds that the boards use (vLLM 0.11, SGLang 0.5.23, LMDeploy 0.18). Their own labels do not matter.
_OTHERS = (
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:generation_tokens_total",
    "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total", "sglang:num_running_reqs", "sglang:num_queue_reqs",
    "sglang:generation_tokens_total", "sglang:token_usage", "lmdeploy:num_requests_running",
    "lmdeploy:num_requests_waiting", "lmdeploy:generation_tokens_total", "lmdeploy:gpu_cache_usage_perc",
)  # fmt: skip


def _names(family: Metric) -> list[str]:
    if family.type == "histogram":
        return [f"{family.name}{suffix}" for suffix in ("_bucket", "_sum", "_count")]
    return [f"{family.name}_total" if family.type == "counter" else family.name]


def _of(families: Iterable[Metric]) -> dict[str, set[str]]:
    """From families that may have no samples yet."""
    return {
        name: {*family._labelnames, *({"le"} if name.endswith("_bucket") else ())}  # type: ignore[attr-defined]
        for family in families
        for name in _names(family)
    }


def engine_text() -> str:
    """The metrics of a builtin engine, with every label value that can occur once."""
    sizes = (
        "blocks_total", "blocks_free", "blocks_cached", "blocks_referenced", "blocks_leased", "blocks_quarantined",
        "blocks_reserved", "held_back", "running", "waiting", "tokens_total",
    )  # fmt: skip
    counters = (
        "prefix_tokens", "prefix_hits", "prompts_own", "prompts_received", "drafted", "accepted", f"{AHEAD}launched",
    )  # fmt: skip
    transfers = ("hand_overs", "pulls", "lost", "early", "bytes", "seconds", "hand_over_seconds")
    fields = {
        "name": "e", "role": "decode", "epoch": "1", **dict.fromkeys(sizes, 0), "leases": [], "links": [],
        "transfers": dict.fromkeys(transfers, 1.0), "counters": dict.fromkeys(counters, 1),
        "work": Work(StepTimes((0.0, 0.0, 0.0, 0.0, 0.0)), 1),
    }  # fmt: skip
    state = msgspec.convert(fields, EngineState)
    desk = SimpleNamespace(block_seconds=lambda: (0.0, 0.0), table=SimpleNamespace(ended={LeaseState.COMMITTED: 1}))
    return render_metrics(state, cast("LeaseDesk", desk), 0.0).decode()


def known() -> dict[str, set[str]]:
    """Label names by metric name."""
    counters = Metrics("m", 1.0, 1.0).counters
    found = _of(_Native(counters, EnginePool([]), FairQueue()).collect())
    found |= _of(of_status(Status("ready", [], []))) | _of(of_ports(RdmaTree(Support.NO_DEVICE))) | _of(_Round()._own())
    for family in text_string_to_metric_families(engine_text()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels, {"engine"})
    found |= {name: {"engine"} for name in _OTHERS}
    found["up"] = set()
    return {name: labels | ADDED for name, labels in found.items()}
