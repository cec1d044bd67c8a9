"""Choose the GPUs of engines. Pure: the input is the host's facts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import comb
from pathlib import Path

from pdctl.errors import PdctlError
from pdctl.host import Host
from pdctl.topology.spec import Device, EngineGroup, Topology

# Ways to choose several GPUs that are compared; of more, the first ones are taken.
_MOST_CHOICES = 20_000
# Of a GPU's memory, for all engines on it: contexts and the driver need the rest.
_MOST_SHARED = 0.95


def assign_gpus(
    topology: Topology, host: Host, before: Mapping[str, tuple[str, ...]], run_dir: Path
) -> dict[str, tuple[str, ...]]:
    """Engine name to UUIDs of its GPUs. Raises PdctlError if there are too few.

    GPUs named in the topology come first, then those that an engine had `before`, then free ones: idle GPUs before
    those that other processes use, in the order of the environment. An engine with several gets those that are nearest
    to each other, idle ones before those in use.
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
                chosen[name] = _gpus_for(group, position, name, host, free, str(run_dir))
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


def _nearest(free: list[str], each: int, host: Host, run_dir: str) -> tuple[str, ...]:
    """So many of the free GPUs: those that come first, if each engine has one; else idle ones, of these those that are
    nearest to each other, and of equally near ones those that come first."""
    if each == 1 or comb(len(free), each) > _MOST_CHOICES:
        return tuple(free[:each])
    busy = {uuid for uuid in free if host.strangers_on(uuid, run_dir)}
    return min(combinations(free, each), key=lambda chosen: (len(busy.intersection(chosen)), *spread(host, chosen)))


def spread(host: Host, uuids: tuple[str, ...]) -> tuple[int, int]:
    """How far these GPUs are from each other: the longest distance (see DISTANCES), and the sum of all."""
    gpus = [gpu for gpu in host.gpus if gpu.uuid in uuids]
    found = [one.distance(other.uuid) for one, other in combinations(gpus, 2)]
    return max(found, default=0), sum(found)


def _gpus_for(
    group: EngineGroup, position: int, name: str, host: Host, free: list[str], run_dir: str
) -> tuple[str, ...]:
    each = group.gpus_per_replica
    if group.gpus:
        gpus = [host.gpu_named(gpu) for gpu in gpus_named(group, position)]
        return tuple(gpu.uuid for gpu in gpus if gpu is not None)
    if len(free) >= each:
        chosen = _nearest(free, each, host, run_dir)
        free[:] = [uuid for uuid in free if uuid not in chosen]
        return chosen
    if group.share_gpu and len(host.gpus) >= each:
        return tuple(host.gpus[(position * each + n) % len(host.gpus)].uuid for n in range(each))
    hint = "lower replicas, or set share_gpu = true on engines that may share a GPU"
    count = len(host.gpus)
    ours = f"; {count} available through {host.gpus_by}" if host.gpus_by else f": this machine has {count}"
    wanted = "no GPU is left" if each == 1 else f"{each} GPUs are needed but {len(free)} are left"
    raise PdctlError(f"{wanted} for {name}{ours}", hint)
