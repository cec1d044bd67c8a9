"""The measured part of `pdctl status`: what processes use and what engines do, taken when somebody looks."""

from __future__ import annotations

import time

from pdctl.host.gpu import gpu_use
from pdctl.supervisor.process.usage import CpuShares, Use, read_uses
from pdctl.supervisor.unit.unit import Unit
from pdctl.wire import EngineState

Measurements = dict[str, object]


class MeasurementReader:
    """Rates are between two looks."""

    def __init__(self) -> None:
        self._cpu = CpuShares()
        self._tokens: dict[str, tuple[float, int]] = {}

    def of(self, units: list[Unit], states: dict[str, EngineState | str]) -> dict[str, Measurements]:
        """By name: what is known of each now, None for what is not."""
        leaders = {unit.name: unit.pid for unit in units if unit.alive and unit.pid is not None}
        uses = read_uses(leaders.values())
        self._cpu.keep(leaders.values())
        gpus = {uuid for unit in units for uuid in unit.spec.gpus}
        memory = {uuid: use.by_pid for uuid, use in gpu_use(sorted(gpus)).items()} if gpus else {}
        found = {}
        for unit in units:
            use = uses.get(leaders.get(unit.name, 0))
            state = states.get(unit.name)
            found[unit.name] = {
                "rss_bytes": use.rss if use else None,
                "cpu_percent": self._cpu.percent(leaders[unit.name], use, unit.started_at) if use else None,
                "gpu_memory_bytes": _gpu_memory(unit, use, memory),
                **self._work(unit, state if isinstance(state, EngineState) else None),
            }
        return found

    def _work(self, unit: Unit, state: EngineState | None) -> Measurements:
        if state is None:
            names = ("running", "waiting", "kv_used", "leases", "tokens_per_s")
            return dict.fromkeys(names)
        used = state.blocks_total - state.blocks_free - state.blocks_cached
        return {
            "running": state.running,
            "waiting": state.waiting,
            "kv_used": round(used / state.blocks_total, 4) if state.blocks_total else None,
            "leases": len(state.leases),
            "tokens_per_s": self._rate(unit, state.tokens_total),
        }

    def _rate(self, unit: Unit, tokens: int) -> float:
        now = time.monotonic()
        at, before = self._tokens.get(unit.epoch, (unit.started_at, 0))
        self._tokens[unit.epoch] = (now, tokens)
        while len(self._tokens) > 4096:
            self._tokens.pop(next(iter(self._tokens)))
        return round(max(0, tokens - before) / max(0.01, now - at), 1)


def _gpu_memory(unit: Unit, use: Use | None, memory: dict[str, dict[int, int]]) -> int | None:
    if not unit.spec.gpus or use is None or not memory:
        return None
    import psutil

    listed = [(pid, taken) for uuid in unit.spec.gpus for pid, taken in memory.get(uuid, {}).items()]
    # A driver that knows none of the pids here tells nothing about them: neither is it zero.
    if listed and not any(psutil.pid_exists(pid) for pid, _ in listed):
        return None
    return sum(taken for pid, taken in listed if pid in use.pids)
