"""Clearing up: no replacement starts until the dead process's tree is empty and its ports and GPU memory are free.

While something blocks the start, it is reported with its pid and command.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pdctl.host.devices.gpu import GpuUse, gpu_use
from pdctl.host.processes.ports import listening_ports
from pdctl.plan import ProcessSpec
from pdctl.supervisor.process.tree import Tree, kill_tree

# A killed process that still exists after this is stuck in the kernel: it is reported and waited for, not replaced.
_KILL_DEADLINE_S = 10.0
_LOOK_S = 0.05
_LOOK_AGAIN_S = 1.0
# GPU memory in use may exceed the use before the start by this much: drivers keep a little.
_GPU_SLACK = 256 * 2**20
# In virtual machines and containers, drivers report no processes or those of another pid namespace. Memory with an
# unknown holder may belong to an engine of this service that shares the GPU, so a replacement waits for it only this
# long.
_UNNAMED_HOLDER_S = 5.0

# GPU UUID -> bytes used before the process was started.
Baseline = dict[str, int]


@dataclass(frozen=True, slots=True)
class Remains:
    """What a dead process may have left. `ours`: pids of this service, never treated as foreign processes."""

    spec: ProcessSpec
    tree: Tree
    baseline: Baseline
    ours: Callable[[], set[int]]


async def clear(remains: Remains, blocked: Callable[[str], None]) -> None:
    """Return when nothing is left. `blocked` is called with the obstacle each time it changes, and "" at the end."""
    said = ""
    started = time.monotonic()
    while True:
        left = await kill_tree(remains.tree, remains.ours(), _KILL_DEADLINE_S)
        is_patient = time.monotonic() - started < _UNNAMED_HOLDER_S
        reason = (
            f"pids {left} did not exit after SIGKILL"
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
    """What prevents the start of `spec`, or "". `is_patient`: also wait for GPU memory with an unknown holder."""
    for name, port in spec.ports.items():
        if (spec.listen is None or spec.listen[1] != port) and not _is_free(spec.host, port):
            holder = listening_ports().get(port)
            who = holder.describe() if holder else "a connection that is being closed"
            return f"its {name} port {port} is in use by {who}"
    return _gpu_memory(spec, baseline, ours, is_patient) if spec.gpus else ""


def baseline_of(spec: ProcessSpec) -> Baseline:
    """Memory now in use on its GPUs, where a driver reports it."""
    return {uuid: use.used for uuid, use in gpu_use(spec.gpus).items()} if spec.gpus else {}


def _gpu_memory(spec: ProcessSpec, baseline: Baseline, ours: set[int], is_patient: bool) -> str:
    for uuid, use in gpu_use(spec.gpus).items():
        before = baseline.get(uuid)
        if before is None or use.used <= before + _GPU_SLACK:
            continue
        known, strangers = _holders_here(use.by_pid, ours)
        # Engines of this service that share the GPU may change their memory use at any time.
        if strangers or (not known and is_patient):
            held = f"{_gib(use)} in use, but {before / 2**30:.1f} GiB before the start"
            return f"GPU {uuid} has {held}: {_holders(strangers)}"
    return ""


def _holders_here(pids: Iterable[int], ours: set[int]) -> tuple[list[int], list[int]]:
    """The pids that exist in this pid namespace, and those among them that are foreign: neither in `ours` nor
    descendants of one. An engine's memory is held by its core, a child of the process that the supervisor started."""
    # Imported here: the import takes a tenth of a second, and machines without a GPU never need it.
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
    return f"held by pids {pids}" if pids else "the driver has not freed it yet"


def _is_free(host: str, port: int) -> bool:
    """Whether an engine could listen there. SO_REUSEADDR, as engines do: connections in TIME_WAIT do not count."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
