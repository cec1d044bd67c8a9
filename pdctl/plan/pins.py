"""Which CPUs, GPU and RDMA devices an engine gets, and why: pure, over what the host has."""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.host import Holder, Host
from pdctl.host.pci import CLASSES
from pdctl.topology.spec import EngineGroup, Topology

# How a reason says that others compute on a GPU; `plan` and `up` make a warning of it.
IN_USE = "; in use by "
_MOST_HOLDERS = 3


@dataclass(frozen=True, slots=True)
class Pins:
    """`why`: the reason for each, by name of the field."""

    cpus: tuple[int, ...]
    rdma: tuple[str, ...]
    why: dict[str, str]


def pins_of(topology: Topology, host: Host, group: EngineGroup, name: str, gpu_uuid: str | None, run_dir: str) -> Pins:
    """One engine's."""
    pci = next((gpu.pci for gpu in host.gpus if gpu.uuid == gpu_uuid), "")
    cpus, why_cpus = _cpus(host, group, name, pci)
    rdma, why_rdma = _rdma(topology, host, pci)
    why = {"cpus": why_cpus, "rdma": why_rdma}
    if gpu_uuid:
        why["gpus"] = _why_gpu(host, group, gpu_uuid, pci, run_dir)
    return Pins(cpus, rdma, {key: reason for key, reason in why.items() if reason})


def _why_gpu(host: Host, group: EngineGroup, uuid: str, pci: str, run_dir: str) -> str:
    strangers = host.strangers_on(uuid, run_dir)
    named = "named in the topology" if group.gpus else "the first that was free" if strangers else "the first idle one"
    place = f", at {pci}" if pci else ""
    allotted = f", of those that {host.gpus_by} leaves us" if host.gpus_by else ""
    return f"{named}{place}{allotted}{IN_USE + _listed(strangers) if strangers else ''}"


def _listed(holders: tuple[Holder, ...]) -> str:
    shown = ", ".join(holder.describe() for holder in holders[:_MOST_HOLDERS])
    more = len(holders) - _MOST_HOLDERS
    return f"{shown} and {more} more" if more > 0 else shown


def _cpus(host: Host, group: EngineGroup, name: str, pci: str) -> tuple[tuple[int, ...], str]:
    if group.cpus:
        share = _share(group, name)
        part = "" if share == group.cpus else ", its share of the group's"
        return share, f"named in the topology{part}"
    node = host.layout.nodes.get(pci, -1)
    near = tuple(cpu for cpu in host.layout.cpus.get(node, ()) if cpu in host.cpus)
    if near:
        return near, f"NUMA node {node}, where its GPU is"
    return host.cpus, "all that we may use"


def _share(group: EngineGroup, name: str) -> tuple[int, ...]:
    """Each replica its own equal share where the group's CPUs divide evenly, else all of them."""
    index = group.replica_names().index(name)
    share, rest = divmod(len(group.cpus), group.replicas)
    return group.cpus[index * share : (index + 1) * share] if share and not rest else group.cpus


def _rdma(topology: Topology, host: Host, pci: str) -> tuple[tuple[str, ...], str]:
    transfer = topology.transfer
    if transfer.backend in ("auto", "shm") or transfer.protocol == "tcp":
        return (), ""
    if transfer.devices:
        return transfer.devices, "named in the topology"
    active = [device.name for device in host.rdma if device.is_active]
    known = {name: host.layout.classes.get((pci, name), "?") for name in active}
    near = [name for name in active if known[name] in CLASSES]
    by = f" (of those that {host.rdma_by} leaves us)" if host.rdma_by else ""
    if not near:
        if by and active:
            return tuple(active), f"all{by}"
        return (), "left to the transport: no GPU, or no active device of known place" if active else ""
    best = min(near, key=lambda name: CLASSES.index(known[name]))
    return (best,), f"{known[best]} from its GPU; " + ", ".join(f"{name} {known[name]}" for name in active) + by
