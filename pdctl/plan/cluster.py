"""A topology on the nodes of a cluster: which engines want a place, what the nodes have, and the plan of each. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from pdctl.adapters import can_launch, kinds, launcher
from pdctl.errors import PdctlError
from pdctl.host import Host
from pdctl.host.models import UnknownModel
from pdctl.plan import Plan, make_plan
from pdctl.plan.gpus import gpus_named
from pdctl.plan.placement import Room, Wish, assign
from pdctl.plan.share import Share
from pdctl.topology.spec import Cluster, Device, EngineGroup, Topology


def place(
    topology: Topology, hosts: Mapping[str, Host], before: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Plan]:
    """The plan of each node. `hosts`: the facts of the nodes, by name; `before`: where engines are now.

    Raises PdctlError if an engine has no place, or a node's part does not fit it.
    """
    shares = shares_of(topology, hosts, before)
    return {node: _plan(topology, host, shares[node]) for node, host in hosts.items()}


def shares_of(topology: Topology, hosts: Mapping[str, Host], before: Mapping[str, str]) -> dict[str, Share]:
    """The share of each node. Raises PdctlError if an engine has no place."""
    rooms = {node: in_cell(room_of(host), node, topology.cluster) for node, host in hosts.items()}
    spare = topology.cluster.spare_nodes if topology.cluster is not None else 0
    engines: dict[str, list[str]] = {node: [] for node in hosts}
    for name, node in assign(wishes_of(topology), rooms, before, spare).items():
        engines[node].append(name)
    return {node: Share(node, frozenset(names)) for node, names in engines.items()}


def unknown_nodes(topology: Topology, known: Mapping[str, Host]) -> list[str]:
    """Nodes that the topology names, and which are not among the known ones."""
    named = {*topology.proxy.nodes, *(node for group in topology.engines for node in group.nodes)}
    return sorted(named - known.keys())


def _plan(topology: Topology, host: Host, share: Share) -> Plan:
    try:
        return make_plan(topology, host, share=share)
    except UnknownModel as failure:
        hint = "the model's folder must have the same path on every node, and here"
        raise PdctlError(str(failure), hint) from failure
    except PdctlError as failure:
        raise PdctlError(f"node {share.node}: {failure.message}", failure.hint) from failure


def wishes_of(topology: Topology) -> list[Wish]:
    """The engines that pdctl starts, each with what it needs of a node."""
    named: set[tuple[int | str, ...]] = set()
    found = []
    for group in topology.engines:
        for position, name in enumerate(() if group.is_attached else group.replica_names()):
            gpus = {(*group.nodes, gpu) for gpu in gpus_named(group, position)}
            # Engines that list the same GPU need it once.
            found.append(_wish(group, name, shares=gpus <= named if gpus else group.share_gpu))
            named |= gpus
    return found


def room_of(host: Host) -> Room:
    """What a node has for engines."""
    return Room(len(host.gpus), host.memory)


def in_cell(room: Room, node: str, cluster: Cluster | None) -> Room:
    """What a node has, and the cell that its name says."""
    return replace(room, cell=cluster.cell_of(node)) if cluster is not None else room


def engine_packages() -> list[str]:
    """The packages whose versions a plan asks for."""
    launchers = [launcher(kind) for kind in kinds() if can_launch(kind)]
    return sorted({"pdctl", *(name for each in launchers for name in (*each.distributions, *each.tracing))})


def _wish(group: EngineGroup, name: str, shares: bool) -> Wish:
    on_gpus = group.device is Device.CUDA
    return Wish(
        name=name,
        group=group.name,
        role=group.role.value,
        gpus=group.gpus_per_replica if on_gpus else 0,
        nodes=group.nodes,
        shares=on_gpus and shares,
        memory=0 if on_gpus else int(group.kv_cache_gb * 2**30),
    )
