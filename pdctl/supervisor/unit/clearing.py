"""Nothing is started in a dead process's place before its tree is empty, its ports are free and its GPU memory is back.

What is in the way is named: a pid and its command, for as long as it stays.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pdctl.host.gpu import GpuUse, gpu_use
from pdctl.host.ports import listening_ports
from pdctl.plan import ProcessSpec
from pdctl.supervisor.process.tree import Tree, kill_tree

# A killed process that is there after this sits in the kernel; it is named and waited for, never doubled.
_KILL_DEADLINE_S = 10.0
_LOOK_S = 0.05
_LOOK_AGAIN_S = 1.0
# GPU memory that may be above what it was before the process started: drivers keep a little.
_GPU_SLACK = 256 * 2**20
# In virtual machines and containers drivers name no processes, or those of another pid namespace. Memory whose holder
# cannot be named may belong to an engine of ours that shares the GPU, so a replacement waits this long for it, not for
# ever.
_UNNAMED_HOLDER_S = 5.0

# GPU UUID -> bytes used before the process was started.
Baseline = dict[str, int]


@dataclass(frozen=True, slots=True)
class Remains:
    """What a dead process may have left. `ours`: pids of ours, never taken for strangers."""

    spec: ProcessSpec
    tree: Tree
    baseline: Baseline
    ours: Callable[[], set[int]]


async def clear(remains: Remains, blocked: Callable[[str], None]) -> None:
    """Return when nothing is left. `blocked` is told what is in the way each time that changes, "" at the end."""
    said = ""
    started = time.monotonic()
    while True:
        left = await kill_tree(remains.tree, remains.ours(), _KILL_DEADLINE_S)
        is_patient = time.monotonic() - started < _UNNAMED_HOLDER_S
        reason = (
            f"pids {left} do not die"
            if left
            else in_the_way(remains.spec, remains.baseline, remains.ours(), is_patient)
        )
        if reason != said and (not reason or time.monotonic() - started > _LOOK_S):
            said = reason
            blocked(reason)
        if not reason:
            return
        await asyncio.sleep(_LOOK_S if time.monotonic() - started < _LOOK_AGAIN_S else _LOOK_AGAIN_S)


def in_the_way(spec: ProcessSpec, baseline: Baseline, ours: set[int], is_patient: bool = True) -> str:
    """What keeps `spec` from being started, or "". `is_patient`: also GPU memory whose holder cannot be named."""
    for name, port in spec.ports.items():
        if (spec.listen is None or spec.listen[1] != port) and not _is_free(port):
            holder = listening_ports().get(port)
            who = holder.describe() if holder else "a connection that is being closed"
            return f"its {name} port {port} is held by {who}"
    return _gpu_memory(spec, baseline, ours, is_patient) if spec.gpus else ""


def baseline_of(spec: ProcessSpec) -> Baseline:
    """Memory in use on its GPUs now, where a driver tells."""
    return {uuid: use.used for uuid, use in gpu_use(spec.gpus).items()} if spec.gpus else {}


def _gpu_memory(spec: ProcessSpec, baseline: Baseline, ours: set[int], is_patient: bool) -> str:
    for uuid, use in gpu_use(spec.gpus).items():
        before = baseline.get(uuid)
        if before is None or use.used <= before + _GPU_SLACK:
            continue
        known, strangers = _holders_here(use.by_pid, ours)
        # Engines of ours that share the GPU grow and shrink as they like.
        if strangers or (not known and is_patient):
            return f"GPU {uuid} has {_gib(use)} in use, {before / 2**30:.1f} GiB before: {_holders(strangers)}"
    return ""


def _holders_here(pids: Iterable[int], ours: set[int]) -> tuple[list[int], list[int]]:
    """Those of the pids that live here, and those of them that neither are ours nor stand below one of ours: an
    engine's memory is held by its core, a child of the process that we started."""
    # Here: importing it takes a tenth of a second, and machines without a GPU never need it.
    import psutil

    known, strangers = [], []
    for pid in sorted(pids):
        try:
            above = {parent.pid for parent in psutil.Process(pid).parents()}
        except psutil.NoSuchProcess:
            continue
        known.append(pid)
        if pid not in ours and not above & ours:
            strangers.append(pid)
    return known, strangers


def _gib(use: GpuUse) -> str:
    return f"{use.used / 2**30:.1f} GiB"


def _holders(pids: list[int]) -> str:
    return f"held by pids {pids}" if pids else "the driver has not let go of it yet"


def _is_free(port: int) -> bool:
    """Whether an engine could listen there. SO_REUSEADDR, as engines do: connections in TIME_WAIT do not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
