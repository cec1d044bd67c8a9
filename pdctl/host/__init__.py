"""Facts of this host. Every reader takes its root folder as a parameter, so that tests can use a fake tree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from pdctl.host.devices.allotment import allotted, allotted_rdma
from pdctl.host.devices.gpu import Gpu, gpu_holders, read_gpus
from pdctl.host.devices.pci import Layout, read_layout
from pdctl.host.devices.rdma import RdmaDevice, read_rdma
from pdctl.host.memory import read_memory
from pdctl.host.packages import installed_package
from pdctl.host.processes.claims import claimed_ports
from pdctl.host.processes.ports import PortHolder, listening_ports
from pdctl.host.processes.stamps import stamp_of
from pdctl.host.program import engine_python, executable
from pdctl.host.users import cache_root, run_root, state_root
from pdctl.net import LOOPBACK

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

# Modules that the builtin engine, or the proxy's export of spans, needs to start.
ENGINE_PACKAGES = ("torch", "transformers", "tokenizers", "zmq", "numpy", "jinja2")
OTLP_PACKAGES = ("opentelemetry",)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that uses a GPU. `service`: the run directory of its pdctl service, or ""."""

    pid: int
    command: str
    service: str = ""

    def describe(self) -> str:
        """A description for messages."""
        part = f", of the pdctl service {Path(self.service).name!r}" if self.service else ""
        return f"pid {self.pid} ({self.command or 'unknown'}{part})"


@dataclass(frozen=True, slots=True)
class Host:
    """The facts that a plan needs. `cpus`: the CPUs that this process may use, ascending; `memory` in bytes.

    `gpus` and `rdma`: the devices that the environment makes available (`gpus_by` and `rdma_by` name the variable that
    limits them); `gpu_holders`: by UUID, the processes that use the GPU now. `python`: the interpreter of engines whose
    group names none, "" if there is none; `program`: the executable of pdctl's own parts, "" if that is `python`.
    `address`: where other processes of the service reach those on this host. `package_in` reads a package's version
    from another Python environment. `claimed`: ports that services of pdctl keep for their processes.
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
    address: str = LOOPBACK
    gpu_holders: dict[str, tuple[Holder, ...]] = field(default_factory=dict, hash=False)
    program: str = ""
    claimed: frozenset[int] = frozenset()
    package_in: Callable[[str, tuple[str, ...]], tuple[str, str] | None] = installed_package

    def gpu_named(self, name: int | str) -> Gpu | None:
        """The available GPU with this name: a driver index, a UUID or a prefix of it, or a MIG slice."""
        if isinstance(name, int):
            return next((gpu for gpu in self.gpus if gpu.index == name), None)
        found = [gpu for gpu in self.gpus if gpu.uuid.startswith(name)]
        return found[0] if len(found) == 1 else None

    def strangers_on(self, uuid: str, run_dir: str) -> tuple[Holder, ...]:
        """Processes that use a GPU and do not belong to the service of this run directory."""
        return tuple(holder for holder in self.gpu_holders.get(uuid, ()) if holder.service != run_dir)

    def lacks(self, packages: tuple[str, ...]) -> list[str]:
        """The packages among these that are not installed."""
        return [name for name in packages if name in self.missing_packages]


def read_host(proc_root: Path = Path("/proc"), sysfs_root: Path = Path("/sys")) -> Host:
    """Read the facts. Takes a few milliseconds, or tens with a GPU driver."""
    rdma, rdma_by = allotted_rdma(read_rdma(sysfs_root), os.environ)
    gpus, gpus_by = allotted(read_gpus(), os.environ)
    return Host(
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        gpus=gpus,
        memory=read_memory(proc_root)[0],
        listening=listening_ports(proc_root),
        claimed=claimed_ports(proc_root),
        python=engine_python(),
        program=executable(),
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
    from pdctl.wire import UNIT_ENV  # imported here to keep the command line's imports light

    folder, command = proc_root / str(pid), ""
    with contextlib.suppress(OSError):
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:60]
    service = stamp_of(pid, UNIT_ENV, proc_root).rpartition(":")[0]
    return Holder(pid, command, service)
