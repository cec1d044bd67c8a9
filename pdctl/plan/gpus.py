"""Choose the GPUs of engines. Pure: the input is the host's facts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pdctl.errors import PdctlError
from pdctl.host import Host
from pdctl.topology.spec import Device, EngineGroup, Topology

# Of a GPU's memory, for all engines on it: contexts and the driver need the rest.
_MOST_SHARED = 0.95


def assign_gpus(
    topology: Topology, host: Host, before: Mapping[str, tuple[str, ...]], run_dir: Path
) -> dict[str, tuple[str, ...]]:
    """Engine name to UUIDs of its GPUs. Raises PdctlError if there are too few.

    GPUs named in the topology come first, then those that an engine had `before`, then free ones: idle GPUs before
    those that other processes use, in the order of the environment.
    """
    cuda = [group for group in topology.engines if group.device is Device.CUDA and not group.is_attached]
    names = [name for group in cuda for name in group.gpus]
    names += [name for process in topology.processes for name in process.gpus]
    named = {gpu.uuid for name in names if (gpu := host.gpu_named(name)) is not None}
    free = [gpu.uuid for gpu in host.gpus if gpu.uuid not in named]
    free.sort(key=lambda uuid: bool(host.strangers_on(uuid, str(run_dir))))
    chosen: dict[str, tuple[str, ...]] = {}
    for group in cuda:
        for name in () if group.gpus else group.replica_names():
            kept = before.get(name, ())
            if len(kept) == group.gpus_per_replica and set(kept) <= set(free):
                chosen[name] = kept
                free = [uuid for uuid in free if uuid not in kept]
    for group in cuda:
        for position, name in enumerate(group.replica_names()):
            if name not in chosen:
                chosen[name] = _gpus_for(group, position, name, host, free)
    _check_shares(cuda, chosen, host)
    return chosen


def _check_shares(groups: list[EngineGroup], chosen: Mapping[str, tuple[str, ...]], host: Host) -> None:
    """Raise PdctlError if engines on one GPU want more of its memory than it has."""
    for gpu in host.gpus:
        shares = {
            name: group.gpu_memory_utilization
            for group in groups
            for name in group.replica_names()
            if gpu.uuid in chosen[name] and group.gpu_memory_utilization
        }
        if len(shares) > 1 and sum(shares.values()) > _MOST_SHARED:
            listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            raise PdctlError(
                f"the engines on GPU {gpu.index} want {sum(shares.values()):g} of its memory: {listed}",
                f"lower gpu_memory_utilization to {_MOST_SHARED / len(shares):.2g} each, {_MOST_SHARED:g} in total",
            )


def gpus_named(group: EngineGroup, position: int) -> tuple[int | str, ...]:
    """The GPUs that the topology names for the replica in this place of its group; empty if it names none."""
    if not group.gpus:
        return ()
    each = group.gpus_per_replica
    first = position * each % len(group.gpus)
    return group.gpus[first : first + each]


def _gpus_for(group: EngineGroup, position: int, name: str, host: Host, free: list[str]) -> tuple[str, ...]:
    each = group.gpus_per_replica
    if group.gpus:
        gpus = [host.gpu_named(gpu) for gpu in gpus_named(group, position)]
        return tuple(gpu.uuid for gpu in gpus if gpu is not None)
    if len(free) >= each:
        chosen = tuple(free[:each])
        del free[:each]
        return chosen
    if group.share_gpu and len(host.gpus) >= each:
        return tuple(host.gpus[(position * each + n) % len(host.gpus)].uuid for n in range(each))
    hint = "lower replicas, or set share_gpu = true on engines that may share a GPU"
    count = len(host.gpus)
    ours = f"; {count} available through {host.gpus_by}" if host.gpus_by else f": this machine has {count}"
    wanted = "no GPU is left" if each == 1 else f"{each} GPUs are needed but {len(free)} are left"
    raise PdctlError(f"{wanted} for {name}{ours}", hint)
