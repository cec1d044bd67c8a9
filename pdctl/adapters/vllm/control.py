"""What the supervisor learns from a vLLM engine: its Prometheus metrics. Its leases end by vLLM's own timeout."""

from __future__ import annotations

import re

from pdctl.adapters import Ability, NoControl, Progress, Target
from pdctl.net.http_client import Unreachable
from pdctl.wire import EngineState

_METRICS = "/metrics"
# One sample: name, labels, value. Data-parallel ranks have a sample each, told apart by a label.
_SAMPLE = re.compile(r"^(vllm:[a-z_]+)(\{[^\n]*\})? ([0-9.eE+-]+)$", re.MULTILINE)
_LABEL = re.compile(r'([a-z_]+)="([^"]*)"')
_INFO = "vllm:cache_config_info"
# Counters that say what went wrong, by the name that `pdctl kv` shows.
_COUNTERS = {
    "expired_leases": "vllm:nixl_num_kv_expired_reqs_total",
    "late_reads": "vllm:nixl_num_notifications_after_expiry_total",
    "failed_transfers": "vllm:nixl_num_failed_transfers_total",
    "preemptions": "vllm:num_preemptions_total",
    "prefix_tokens": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
}


class VllmControl(NoControl):
    """See Control."""

    abilities = frozenset({Ability.STATE})
    progress_path = _METRICS

    def progress(self, body: bytes) -> Progress:
        """See Control.progress."""
        found = _samples(body)
        return Progress(
            running=int(found["vllm:num_requests_running"]),
            # A prefill engine computes prompts, and one token of each.
            tokens_total=int(found["vllm:generation_tokens_total"] + found.get("vllm:prompt_tokens_total", 0)),
            steps_total=int(found.get("vllm:iteration_tokens_total_count", 0)),
        )

    async def state(self, engine: Target, timeout_s: float) -> EngineState:
        """See Control.state. The engine reports neither its leases nor its links."""
        answer = await engine.pool.request("GET", _METRICS, timeout_s=timeout_s)
        try:
            return _state(answer.body)
        except ValueError as failure:
            raise Unreachable(f"{_METRICS} answered {answer.status} without vLLM's metrics: {failure}") from None


CONTROL = VllmControl()


def _samples(body: bytes) -> dict[str, float]:
    """The sum of each metric over the engine's ranks. Raises ValueError if these are not vLLM's metrics."""
    found: dict[str, float] = {}
    for name, _, value in _SAMPLE.findall(body.decode()):
        if not name.endswith("_bucket"):
            found[name] = found.get(name, 0.0) + float(value)
    if missing := {"vllm:num_requests_running", "vllm:generation_tokens_total"} - found.keys():
        raise ValueError(f"no {', '.join(sorted(missing))}")
    return found


def _state(body: bytes) -> EngineState:
    found = _samples(body)
    total, block_size, ranks = 0, 0, 0
    for name, labels, _ in _SAMPLE.findall(body.decode()):
        if name == _INFO:
            info = dict(_LABEL.findall(labels))
            ranks += 1
            total += _whole(info.get("num_gpu_blocks", ""))
            block_size = _whole(info.get("block_size", ""))
    used = round(found.get("vllm:kv_cache_usage_perc", 0.0) / max(1, ranks) * total)
    return EngineState(
        name="",
        role="",
        epoch="",
        blocks_total=total,
        blocks_free=total - used,
        blocks_cached=0,
        blocks_referenced=used,
        blocks_leased=0,
        blocks_quarantined=0,
        blocks_reserved=0,
        held_back=0,
        running=int(found["vllm:num_requests_running"]),
        waiting=int(found.get("vllm:num_requests_waiting", 0)),
        tokens_total=int(found["vllm:generation_tokens_total"]),
        leases=[],
        links=[],
        transfers={},
        block_size=block_size,
        steps_total=int(found.get("vllm:iteration_tokens_total_count", 0)),
        counters={name: int(found[metric]) for name, metric in _COUNTERS.items() if metric in found},
    )


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() else 0
