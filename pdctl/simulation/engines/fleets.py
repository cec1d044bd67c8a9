"""Imagined services from topologies, or from a few words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pdctl.errors import PdctlError
from pdctl.simulation.engines.profiles import Speed
from pdctl.simulation.spec import ElasticSpec, EngineSpec, Fault, MachineSpec, ServiceSpec
from pdctl.topology.spec import ENGINE_ROLES, Device, EngineGroup, Topology

_ENGINE = re.compile(r"(?P<role>\w+)(?::(?P<count>\d+))?(?:@(?P<speed>[^@]+))?")
_FAULT = re.compile(r"(?P<name>[\w-]+):(?P<at>\d+(?:\.\d+)?):(?P<after>\d+(?:\.\d+)?)")
_CPUS = "cpus"


@dataclass(frozen=True, slots=True)
class Wish:
    """Engines in a few words. `speed`: a factor, or the name of a profile's file; "" for 1."""

    role: str
    count: int
    speed: str


@dataclass(frozen=True, slots=True)
class Memory:
    """`token_bytes`: KV of a token; `kv_gb`: GiB of KV of an engine, None: as its topology says."""

    token_bytes: int
    kv_gb: float | None = None

    def blocks(self, kv_gb: float, block_size: int, name: str) -> int:
        """Blocks of an engine that has so many GiB unless all have others. Raises PdctlError."""
        found = int((self.kv_gb or kv_gb) * 2**30 / (self.token_bytes * block_size))
        if found < 1:
            raise PdctlError(f"{name} has room for no block of KV", "give it more with --kv-gb")
        return found


def parse_wish(word: str) -> Wish:
    """ROLE[:COUNT][@SPEED], such as decode:2@0.5. Raises PdctlError."""
    found = _ENGINE.fullmatch(word.strip())
    hint = f"such as prefill, decode:2 or hybrid:4@0.5; roles: {', '.join(sorted(ENGINE_ROLES))}"
    if found is None or found["role"] not in ENGINE_ROLES or found["count"] == "0":
        raise PdctlError(f"--engine {word!r} is not an engine", hint)
    return Wish(found["role"], int(found["count"] or 1), found["speed"] or "")


def parse_fault(word: str) -> Fault:
    """NAME:AT:AFTER, seconds. Raises PdctlError."""
    found = _FAULT.fullmatch(word.strip())
    if found is None:
        raise PdctlError(f"--kill {word!r} is not a death", "such as decode-0:30:5: killed after 30 s, ready 5 s later")
    return Fault(found["name"], float(found["at"]), float(found["after"]))


def of_wishes(wishes: Sequence[tuple[Wish, Speed]], base: EngineSpec) -> tuple[EngineSpec, ...]:
    """Engines as wished, otherwise like `base`. Names are ROLE-0, ROLE-1 and so on."""
    counts: dict[str, int] = {}
    found = []
    for wish, speed in wishes:
        for _ in range(wish.count):
            number = counts.get(wish.role, 0)
            counts[wish.role] = number + 1
            found.append(replace(base, name=f"{wish.role}-{number}", role=wish.role, times=speed.times))
    return tuple(found)


def of_topology(topology: Topology, speed: Speed, memory: Memory, cores: int, slowdown: float) -> ServiceSpec:
    """The service of a topology, on a machine with so many cores for its engines on CPUs. Raises PdctlError for engines
    whose scheduler is not pdctl's."""
    groups = topology.engines
    for group in groups:
        if group.kind != "builtin" or group.is_attached:
            what = "an attached engine" if group.is_attached else f"an engine of kind {group.kind!r}"
            raise PdctlError(f"{group.name} is {what}", "only builtin engines can be simulated")
    engines = tuple(_engine(topology, group, name, speed, memory) for group in groups for name in group.replica_names())
    on_cpus = any(engine.machine == _CPUS for engine in engines)
    defaults = ServiceSpec(engines)
    return replace(
        defaults,
        ttft_s=topology.slo.ttft_ms / 1000,
        tpot_s=topology.slo.tpot_ms / 1000,
        routing=topology.proxy.routing,
        admission=topology.proxy.admission,
        max_queue=topology.proxy.max_queue,
        elastic=_elastic(topology),
        transfer=replace(
            defaults.transfer, token_bytes=memory.token_bytes, chunked=topology.transfer.chunked,
            deadline_s=max(60.0, 4 * topology.transfer.lease_s),
        ),
        machines={_CPUS: MachineSpec(cores, slowdown)} if on_cpus else {},
    )  # fmt: skip


def _elastic(topology: Topology) -> ElasticSpec | None:
    """Whether the roles follow the load. Advice changes nothing."""
    elastic = topology.elastic
    if elastic.mode != "act":
        return None
    return ElasticSpec(elastic.min_prefill, elastic.min_decode, elastic.interval_s, elastic.cooldown_s)


def _engine(topology: Topology, group: EngineGroup, name: str, speed: Speed, memory: Memory) -> EngineSpec:
    if group.kv_share and memory.kv_gb is None:
        raise PdctlError(f"{group.name} takes what its GPU has left", "say how much KV that is with --kv-gb")
    return EngineSpec(
        name, group.role.value, speed.times, memory.blocks(group.kv_cache_gb, group.block_size, name), group.block_size,
        group.max_num_seqs, group.max_num_batched_tokens, topology.service.max_model_len, group.policy,
        group.inline_prefill, group.prefix_caching, topology.transfer.leased_max,
        _CPUS if group.device is Device.CPU else "",
    )  # fmt: skip


def checked(spec: ServiceSpec) -> ServiceSpec:
    """The same. Raises PdctlError for engines that die and do not exist."""
    names = {engine.name for engine in spec.engines}
    for fault in spec.faults:
        if fault.engine not in names:
            raise PdctlError(f"--kill {fault.engine}: there is no such engine", f"engines: {', '.join(sorted(names))}")
    return spec
