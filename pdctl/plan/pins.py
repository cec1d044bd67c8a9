"""Choose an engine's CPUs and RDMA devices, and give the reasons. Pure: the input is the host's facts."""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.adapters import launcher
from pdctl.host import Holder, Host
from pdctl.host.devices.gpu import DISTANCES
from pdctl.host.devices.pci import CLASSES
from pdctl.plan.gpus import spread
from pdctl.topology.spec import Device, EngineGroup, Topology, Transfer
from pdctl.transports import TRANSPORTS

# Marks a reason as "the GPUs that share each layer are on different sockets"; `plan` and `up` warn of it, too.
ACROSS_SOCKETS = "; on different sockets: each step waits for what crosses between them"
# Marks a reason as "other processes use this GPU"; `plan` and `up` turn it into a warning.
IN_USE = "; in use by "
_MOST_HOLDERS = 3


@dataclass(frozen=True, slots=True)
class Pins:
    """An engine's pins. `why`: the reason for each, by field name."""

    cpus: tuple[int, ...]
    rdma: tuple[str, ...]
    why: dict[str, str]


def pins_of(topology: Topology, host: Host, group: EngineGroup, name: str, gpus: tuple[str, ...], run_dir: str) -> Pins:
    """The pins of one engine."""
    first = gpus[0] if gpus else None
    places = {gpu.uuid: gpu.pci for gpu in host.gpus}
    pci = places.get(first or "", "")
    cpus, why_cpus = _cpus(host, group, name, pci)
    rdma, why_rdma = _rdma(topology, host, group, [places.get(uuid, "") for uuid in gpus] or [""])
    why = {"cpus": why_cpus, "rdma": why_rdma}
    if first is not None:
        why["gpus"] = _why_gpu(host, group, gpus, pci, run_dir)
    return Pins(cpus, rdma, {key: reason for key, reason in why.items() if reason})


def _why_gpu(host: Host, group: EngineGroup, gpus: tuple[str, ...], pci: str, run_dir: str) -> str:
    strangers = host.strangers_on(gpus[0], run_dir)
    named = "named in the topology" if group.gpus else "the first free GPU" if strangers else "the first idle GPU"
    place = f", at {pci}" if pci else ""
    allotted = f", available through {host.gpus_by}" if host.gpus_by else ""
    together = _together(host, group, gpus)
    return f"{named}{place}{allotted}{together}{IN_USE + _listed(strangers) if strangers else ''}"


def _together(host: Host, group: EngineGroup, gpus: tuple[str, ...]) -> str:
    """How the GPUs of an engine with several are connected, as far as that is known."""
    longest, _ = spread(host, gpus)
    if len(gpus) < 2 or longest == len(DISTANCES):
        return ""
    is_slow = longest == len(DISTANCES) - 1 and group.tensor_parallel > 1
    return ACROSS_SOCKETS if is_slow else f"; connected by {DISTANCES[longest]}"


def _listed(holders: tuple[Holder, ...]) -> str:
    shown = ", ".join(holder.describe() for holder in holders[:_MOST_HOLDERS])
    more = len(holders) - _MOST_HOLDERS
    return f"{shown} and {more} more" if more > 0 else shown


def _cpus(host: Host, group: EngineGroup, name: str, pci: str) -> tuple[tuple[int, ...], str]:
    if group.cpus:
        share = _share(group, name)
        part = "" if share == group.cpus else ", this replica's share"
        return share, f"named in the topology{part}"
    node = host.layout.nodes.get(pci, -1)
    near = tuple(cpu for cpu in host.layout.cpus.get(node, ()) if cpu in host.cpus)
    if near:
        return near, f"NUMA node {node}, local to its GPU"
    return host.cpus, "all available CPUs"


def _share(group: EngineGroup, name: str) -> tuple[int, ...]:
    """A replica's equal share of the group's CPUs if they divide evenly, else all of them."""
    index = group.replica_names().index(name)
    share, rest = divmod(len(group.cpus), group.replicas)
    return group.cpus[index * share : (index + 1) * share] if share and not rest else group.cpus


def uses_rdma(group: EngineGroup, transfer: Transfer) -> bool:
    """Whether an engine may move KV by RDMA. Engines with connectors of their own do so from GPUs."""
    if transfer.protocol == "tcp":
        return False
    if not group.is_attached and launcher(group.kind).connectors:
        return group.device is Device.CUDA
    chosen = TRANSPORTS.get(transfer.backend)
    return chosen is not None and chosen.crosses_hosts


def _rdma(topology: Topology, host: Host, group: EngineGroup, places: list[str]) -> tuple[tuple[str, ...], str]:
    """The nearest active device of each GPU, of which `places` has the PCI addresses."""
    if not uses_rdma(group, topology.transfer):
        return (), ""
    if topology.transfer.devices:
        return topology.transfer.devices, "named in the topology"
    active = [device.name for device in host.rdma if device.is_active]
    by = f" (available through {host.rdma_by})" if host.rdma_by else ""
    chosen: dict[str, str] = {}
    for pci in places:
        known = {name: host.layout.classes.get((pci, name), "?") for name in active}
        near = [name for name in active if known[name] in CLASSES]
        if not near:
            if by and active:
                return tuple(active), f"all{by}"
            return (), "left to the transport: no GPU, or no active device with a known location" if active else ""
        best = min(near, key=lambda name: CLASSES.index(known[name]))
        chosen.setdefault(
            best, f"{known[best]} from its GPU; " + ", ".join(f"{name} {known[name]}" for name in active) + by
        )
    return tuple(chosen), "; ".join(chosen.values()) if len(chosen) == 1 else _short(chosen) + by


def _short(chosen: dict[str, str]) -> str:
    """The reasons for several devices, each up to its first semicolon."""
    return ", ".join(f"{name} {why.partition(';')[0]}" for name, why in chosen.items())
