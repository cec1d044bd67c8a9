"""A topology on the nodes of a cluster: which engines want a place, what the nodes have, and the plan of each. Pure."""

from __future__ import annotations

from pdctl.adapters import can_launch, kinds, launcher
from pdctl.host import Host
from pdctl.plan.placement import Room, Wish
from pdctl.topology.spec import Device, EngineGroup, Topology


def wishes_of(topology: Topology) -> list[Wish]:
    """The engines that pdctl starts, each with what it needs of a node."""
    groups = (group for group in topology.engines if not group.is_attached)
    return [_wish(group, number, name) for group in groups for number, name in enumerate(group.replica_names())]


def room_of(host: Host) -> Room:
    """What a node has for engines."""
    return Room(len(host.gpus), host.memory)


def engine_packages() -> list[str]:
    """The packages whose versions a plan asks for."""
    launchers = [launcher(kind) for kind in kinds() if can_launch(kind)]
    return sorted({"pdctl", *(name for each in launchers for name in (*each.distributions, *each.tracing))})


def _wish(group: EngineGroup, number: int, name: str) -> Wish:
    on_gpus = group.device is Device.CUDA
    return Wish(
        name=name,
        group=group.name,
        role=group.role.value,
        gpus=group.gpus_per_replica if on_gpus else 0,
        nodes=group.nodes,
        # All replicas use the GPUs of the first, if that many are listed and no more.
        shares=on_gpus and (group.share_gpu or (number > 0 and len(group.gpus) == group.gpus_per_replica)),
        memory=0 if on_gpus else int(group.kv_cache_gb * 2**30),
    )
