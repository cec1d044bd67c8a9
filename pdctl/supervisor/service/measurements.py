"""The measured part of `pdctl status`: resource use of processes and load of engines, measured on request."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec.structs import asdict

from pdctl.adapters import Ability, control
from pdctl.control_api import KeysStatus, KeyStatus, MeasuredProcess, StepLatency, StepPredictions
from pdctl.host.devices.gpu import gpu_use
from pdctl.latency import KINDS, Work
from pdctl.proxy_wire import EVERY_KEY, KeysReply, KeyUse
from pdctl.supervisor.process.usage import CpuShares, Use, read_uses
from pdctl.supervisor.unit.unit import Unit
from pdctl.supervisor.unit.views import status_of
from pdctl.topology.spec import ApiKey
from pdctl.wire import EngineState


class MeasurementReader:
    """Measures processes. Rates are averages since the previous measurement."""

    def __init__(self) -> None:
        self._cpu = CpuShares()
        self._tokens: dict[str, tuple[float, int]] = {}

    def of(self, units: list[Unit], states: dict[str, EngineState | str]) -> tuple[MeasuredProcess, ...]:
        """The current values of each unit, None for unknown ones."""
        leaders = {unit.name: unit.pid for unit in units if unit.alive and unit.pid is not None}
        uses = read_uses(leaders.values())
        self._cpu.keep(leaders.values())
        gpus = {uuid for unit in units for uuid in unit.spec.gpus}
        memory = {uuid: use.by_pid for uuid, use in gpu_use(sorted(gpus)).items()} if gpus else {}
        return tuple(
            self._measured(unit, uses.get(leaders.get(unit.name, 0)), memory, states.get(unit.name)) for unit in units
        )

    def _measured(
        self, unit: Unit, use: Use | None, memory: dict[str, dict[int, int]], answer: EngineState | str | None
    ) -> MeasuredProcess:
        state = answer if isinstance(answer, EngineState) else None
        return MeasuredProcess(
            **asdict(status_of(unit)),
            rss_bytes=use.rss if use else None,
            cpu_percent=self._cpu.percent(unit.pid, use, unit.started_at) if use and unit.pid is not None else None,
            gpu_memory_bytes=_gpu_memory(unit, use, memory),
            running=state.running if state else None,
            waiting=state.waiting if state else None,
            leaving_work=_leaving_work(unit, state) if state else None,
            kv_used=_kv_used(state) if state else None,
            leases=len(state.leases) if state and Ability.REVOKE in control(unit.spec.kind).abilities else None,
            tokens_per_s=self._rate(unit, state.tokens_total) if state else None,
            latency=_latency(state.work) if state and state.work else None,
            prompts_own=state.counters.get("prompts_own") if state else None,
            prompts_received=state.counters.get("prompts_received") if state else None,
            attention=(state.attention or None) if state else None,
            cuda_graphs=(state.cuda_graphs or None) if state else None,
            prefix_hit_rate=_hit_rate(state) if state else None,
        )

    def _rate(self, unit: Unit, tokens: int) -> float:
        now = time.monotonic()
        at, before = self._tokens.get(unit.epoch, (unit.started_at, 0))
        self._tokens[unit.epoch] = (now, tokens)
        while len(self._tokens) > 4096:
            self._tokens.pop(next(iter(self._tokens)))
        return round(max(0, tokens - before) / max(0.01, now - at), 1)


def keys_status(settings: Sequence[ApiKey], replies: Sequence[KeysReply]) -> KeysStatus:
    """The API keys of a service: their settings, and what each proxy worker says of them."""
    names = sorted({name for reply in replies for name in reply.keys})
    entries = {key.name: key for key in settings}
    others = entries.get(EVERY_KEY, ApiKey(EVERY_KEY))
    uses = {name: [reply.keys[name] for reply in replies if name in reply.keys] for name in names}
    return KeysStatus(keys=tuple(_key(name, entries.get(name, others), uses[name]) for name in names))


def _key(name: str, settings: ApiKey, uses: Sequence[KeyUse]) -> KeyStatus:
    requests, answered = sum(use.requests for use in uses), sum(use.first_tokens for use in uses)
    # Each worker counts what the others took when it has a request itself: the one with least left knows most.
    left = [use.requests_left for use in uses if use.requests_left is not None]
    tokens_left = [use.tokens_left for use in uses if use.tokens_left is not None]
    return KeyStatus(
        name=name,
        weight=settings.weight,
        priority=settings.priority,
        running=sum(use.running for use in uses),
        waiting=sum(use.waiting for use in uses),
        requests=round(requests),
        refused=round(sum(use.refused for use in uses)),
        prompt_tokens=round(sum(use.prompt_tokens for use in uses)),
        cached_tokens=round(sum(use.cached_tokens for use in uses)),
        output_tokens=round(sum(use.output_tokens for use in uses)),
        queue_s=round(sum(use.queue_s for use in uses) / max(1.0, requests), 6),
        ttft_s=round(sum(use.ttft_s for use in uses) / answered, 6) if answered else None,
        requests_per_minute=settings.requests_per_minute or None,
        requests_left=int(min(left)) if left else None,
        tokens_per_minute=settings.tokens_per_minute or None,
        tokens_left=int(min(tokens_left)) if tokens_left else None,
        streams=settings.streams or None,
    )


def _latency(work: Work) -> StepLatency:
    return StepLatency(
        coefficients=work.times.coefficients,
        corrections=work.times.corrections,
        slow=work.times.slow,
        predictions=tuple(
            StepPredictions(
                kind=kind,
                steps=one.steps,
                actual_s=one.actual_s,
                predicted_s=one.predicted_s,
                mean_error=one.error / one.steps if one.steps else 0.0,
            )
            for kind, one in zip(KINDS, work.accuracy, strict=True)
        ),
    )


def _leaving_work(unit: Unit, state: EngineState) -> int | None:
    """Of the role that an engine leaves: prompts for peers, or answers."""
    if not unit.leaving_role:
        return None
    return state.prefills if unit.leaving_role == "prefill" else state.answers


def _hit_rate(state: EngineState) -> float | None:
    tokens = state.counters.get("prefix_tokens", 0)
    return round(state.counters.get("prefix_hits", 0) / tokens, 4) if tokens else None


def _kv_used(state: EngineState) -> float | None:
    used = state.blocks_total - state.blocks_free
    return round(used / state.blocks_total, 4) if state.blocks_total else None


def _gpu_memory(unit: Unit, use: Use | None, memory: dict[str, dict[int, int]]) -> int | None:
    if not unit.spec.gpus or use is None or not memory:
        return None
    import psutil

    listed = [(pid, taken) for uuid in unit.spec.gpus for pid, taken in memory.get(uuid, {}).items()]
    # If no listed pid exists here (another pid namespace), the use of our processes is unknown, not zero.
    if listed and not any(psutil.pid_exists(pid) for pid, _ in listed):
        return None
    return sum(taken for pid, taken in listed if pid in use.pids)
