"""Facts of this machine. Every reader takes its root folder as a parameter, so tests can plant a tree."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from pdctl.host.gpu import Gpu, read_gpus
from pdctl.host.memory import read_memory
from pdctl.host.pci import Layout, read_layout
from pdctl.host.ports import PortHolder, listening_ports
from pdctl.host.rdma import RdmaDevice, read_rdma
from pdctl.host.users import cache_root, run_root, state_root

__all__ = [
    "ENGINE_PACKAGES",
    "OTLP_PACKAGES",
    "Gpu",
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
class Host:
    """What the plan needs to know. `cpus` are those this process may run on, ascending; `memory` in bytes."""

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

    def lacks(self, packages: tuple[str, ...]) -> list[str]:
        """Those of these Python packages that are not installed."""
        return [name for name in packages if name in self.missing_packages]


def read_host(proc_root: Path = Path("/proc"), sysfs_root: Path = Path("/sys")) -> Host:
    """Read the facts afresh; a few milliseconds, tens where a GPU driver answers."""
    gpus, rdma = read_gpus(), read_rdma(sysfs_root)
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
        missing_packages=frozenset(n for n in (*ENGINE_PACKAGES, *OTLP_PACKAGES) if find_spec(n) is None),
        layout=read_layout([gpu.pci for gpu in gpus], {device.name: device.pci for device in rdma}, sysfs_root),
    )
