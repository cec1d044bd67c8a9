"""Facts of this machine. Every reader takes its root folder as a parameter, so tests can plant a tree."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from pdctl.host.allotment import allotted, allotted_rdma
from pdctl.host.gpu import Gpu, gpu_holders, read_gpus
from pdctl.host.memory import read_memory
from pdctl.host.pci import Layout, read_layout
from pdctl.host.ports import PortHolder, listening_ports
from pdctl.host.rdma import RdmaDevice, read_rdma
from pdctl.host.users import cache_root, run_root, state_root

__all__ = [
    "ENGINE_PACKAGES",
    "OTLP_PACKAGES",
    "Gpu",
    "Holder",
    "Host",
    "PortHolder",
    "cache_root",
    "read_host",
    "run_root",
    "state_root",
]

# Modules without which the builtin engine, or the proxy's export of spans, cannot start.
ENGINE_PACKAGES = ("torch", "transformers", "tokenizers", "zmq", "numpy", "jinja2")
OTLP_PACKAGES = ("opentelemetry",)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that computes on a GPU. `service`: the run directory of the pdctl service that it is part of, or ""."""

    pid: int
    command: str
    service: str = ""

    def describe(self) -> str:
        """For people."""
        part = f", of the pdctl service {Path(self.service).name!r}" if self.service else ""
        return f"pid {self.pid} ({self.command or 'unknown'}{part})"


@dataclass(frozen=True, slots=True)
class Host:
    """What the plan needs to know. `cpus` are those this process may run on, ascending; `memory` in bytes.

    `gpus` and `rdma` are what the environment leaves to us (`gpus_by` and `rdma_by` say what does); `gpu_holders`:
    by UUID, who computes there now.
    """

    cpus: tuple[int, ...]
    gpus: tuple[Gpu, ...]
    memory: int
    listening: dict[int, PortHolder] = field(hash=False)
    python: str
    cache_root: Path
    run_root: Path
    state_root: Path
    rdma: tuple[RdmaDevice, ...] = ()
    layout: Layout = field(default_factory=Layout, hash=False)
    missing_packages: frozenset[str] = frozenset()
    gpus_by: str = ""
    rdma_by: str = ""
    gpu_holders: dict[str, tuple[Holder, ...]] = field(default_factory=dict, hash=False)

    def gpu_named(self, name: int | str) -> Gpu | None:
        """The GPU of ours that a topology means: a driver index, a UUID or its beginning, a MIG slice."""
        if isinstance(name, int):
            return next((gpu for gpu in self.gpus if gpu.index == name), None)
        found = [gpu for gpu in self.gpus if gpu.uuid.startswith(name)]
        return found[0] if len(found) == 1 else None

    def strangers_on(self, uuid: str, run_dir: str) -> tuple[Holder, ...]:
        """Who computes on a GPU and is no part of the service of this run directory."""
        return tuple(holder for holder in self.gpu_holders.get(uuid, ()) if holder.service != run_dir)

    def lacks(self, packages: tuple[str, ...]) -> list[str]:
        """Those of these Python packages that are not installed."""
        return [name for name in packages if name in self.missing_packages]


def read_host(proc_root: Path = Path("/proc"), sysfs_root: Path = Path("/sys")) -> Host:
    """Read the facts afresh; a few milliseconds, tens where a GPU driver answers."""
    rdma, rdma_by = allotted_rdma(read_rdma(sysfs_root), os.environ)
    gpus, gpus_by = allotted(read_gpus(), os.environ)
    return Host(
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        gpus=gpus,
        memory=read_memory(proc_root)[0],
        listening=listening_ports(proc_root),
        python=sys.executable,
        cache_root=cache_root(),
        run_root=run_root(),
        state_root=state_root(),
        rdma=rdma,
        gpus_by=gpus_by,
        rdma_by=rdma_by,
        gpu_holders=_holders_of(gpus, proc_root) if gpus else {},
        missing_packages=frozenset(n for n in (*ENGINE_PACKAGES, *OTLP_PACKAGES) if find_spec(n) is None),
        layout=read_layout([gpu.pci for gpu in gpus], {device.name: device.pci for device in rdma}, sysfs_root),
    )


def _holders_of(gpus: tuple[Gpu, ...], proc_root: Path) -> dict[str, tuple[Holder, ...]]:
    found = gpu_holders([gpu.uuid for gpu in gpus])
    return {uuid: tuple(_holder(pid, proc_root) for pid in pids) for uuid, pids in found.items()}


def _holder(pid: int, proc_root: Path) -> Holder:
    from pdctl.wire import UNIT_ENV  # here: the command line imports this package, and nothing heavy

    folder, command, service = proc_root / str(pid), "", ""
    with contextlib.suppress(OSError):
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:60]
        for entry in (folder / "environ").read_bytes().split(b"\0"):
            if entry.startswith(f"{UNIT_ENV}=".encode()):
                service = entry.decode(errors="replace").partition("=")[2].rpartition(":")[0]
    return Holder(pid, command, service)
