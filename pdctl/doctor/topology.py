"""Checks of a topology against this machine: everything that `pdctl up` would refuse, and what it would regret."""

from __future__ import annotations

from collections.abc import Iterator

from pdctl.doctor import Finding, Severity
from pdctl.errors import Problem
from pdctl.host import Host
from pdctl.topology import Device, Role, Topology

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def problems(source: str, found: list[Problem]) -> list[Finding]:
    """What the loader refuses."""
    return [
        Finding(
            "topology.invalid",
            Severity.CRITICAL,
            problem.key or source,
            problem.message,
            "",
            f"{source}:{problem.line}" if problem.line else source,
            "",
            problem.hint or "",
        )
        for problem in found
    ]


def check(topology: Topology, host: Host) -> list[Finding]:
    """What a valid topology may still get wrong."""
    found = [finding for one in (ports, loopback, shared_gpus, roles) for finding in one(topology, host)]
    if not found:
        found.append(
            Finding("topology.valid", Severity.OK, topology.source or "topology", "nothing to be said against it")
        )
    return found


def ports(topology: Topology, host: Host) -> Iterator[Finding]:
    """The proxy's port."""
    holder = host.listening.get(topology.proxy.port)
    if holder is not None:
        yield Finding(
            "net.ports",
            Severity.CRITICAL,
            f"proxy.port {topology.proxy.port}",
            f"held by {holder.describe()}",
            "free",
            "/proc/net/tcp",
            "",
            f"stop that process{f': kill {holder.pid}' if holder.pid else ''}, or choose another port",
        )


def loopback(topology: Topology, _: Host) -> Iterator[Finding]:
    """Engines elsewhere cannot read KV from an address that means themselves."""
    far = [
        group for group in topology.engines if group.is_attached and not any(name in group.url for name in _LOOPBACK)
    ]
    started = [group for group in topology.engines if not group.is_attached]
    for group in far:
        if started and {group.role, *(other.role for other in started)} >= {Role.PREFILL, Role.DECODE}:
            yield Finding(
                "net.loopback",
                Severity.WARNING,
                group.name,
                f"{group.url} is elsewhere, and our engines listen on 127.0.0.1",
                "engines that hand over to each other reach each other",
                "[[engines]] url",
                "their hand-overs to it will fail",
                "attach engines of both roles there, or start all of them here",
            )


def shared_gpus(topology: Topology, host: Host) -> Iterator[Finding]:
    """Two engines on one GPU whose KV pools alone are more than it has."""
    cuda = [group for group in topology.engines if group.device is Device.CUDA and not group.is_attached]
    for gpu in host.gpus:
        here = [(g, g.replicas) for g in cuda if gpu.index in g.gpus or (not g.gpus and g.share_gpu)]
        wanted = sum(group.kv_cache_gb * count for group, count in here)
        if len(here) > 1 and wanted * 2**30 > gpu.memory:
            yield Finding(
                "gpu.memory",
                Severity.CRITICAL,
                f"GPU {gpu.index}",
                f"{', '.join(group.name for group, _ in here)} want {wanted:g} GiB of KV",
                f"at most {gpu.memory / 2**30:.0f} GiB, weights besides",
                "kv_cache_gb, NVML",
                "",
                "lower kv_cache_gb, or give each engine a GPU",
            )


def roles(topology: Topology, _: Host) -> Iterator[Finding]:
    """One of a role is a single point of waiting."""
    count = {role: sum(g.replicas for g in topology.engines if g.role is role) for role in Role}
    for role in (Role.PREFILL, Role.DECODE):
        if count[role] == 1 and not count[Role.HYBRID]:
            yield Finding(
                "topology.single",
                Severity.INFO,
                role.value,
                f"one {role.value} engine",
                "two, to go on at once",
                "",
                "while it restarts, requests wait for it",
                "replicas = 2",
            )
