"""A host's facts as JSON, for plans that another machine makes of it.

Left out is what changes by itself (listening ports, processes on GPUs), and what other programs say of themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pdctl.errors import PdctlError
from pdctl.host import Host
from pdctl.host.devices.gpu import Gpu
from pdctl.host.devices.pci import Layout
from pdctl.host.devices.rdma import RdmaDevice
from pdctl.net import LOOPBACK


class _Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """The fields of Host, as far as JSON has them. `classes`: GPU, RDMA device, class; `packages`: version by name, of
    the environment of `python`."""

    cpus: tuple[int, ...]
    memory: int
    python: str
    cache_root: str
    run_root: str
    state_root: str
    gpus: tuple[Gpu, ...] = ()
    rdma: tuple[RdmaDevice, ...] = ()
    numa_nodes: dict[str, int] = {}
    numa_cpus: dict[int, tuple[int, ...]] = {}
    classes: tuple[tuple[str, str, str], ...] = ()
    missing_packages: tuple[str, ...] = ()
    gpus_by: str = ""
    rdma_by: str = ""
    address: str = LOOPBACK
    program: str = ""
    packages: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class _Packages:
    """`package_in` of a host that is elsewhere: what was read there, of one environment."""

    python: str
    versions: dict[str, str] = field(hash=False)

    def __call__(self, python: str, names: tuple[str, ...]) -> tuple[str, str] | None:
        if python != self.python:
            return None
        return next(((name, self.versions[name]) for name in names if name in self.versions), None)


def encode_facts(host: Host, packages: Iterable[str] = ()) -> bytes:
    """The facts as JSON. `packages`: names whose versions are told, too."""
    found = {name: host.package_in(host.python, (name,)) for name in packages} if host.python else {}
    return msgspec.json.encode(
        _Facts(
            cpus=host.cpus,
            memory=host.memory,
            python=host.python,
            cache_root=str(host.cache_root),
            run_root=str(host.run_root),
            state_root=str(host.state_root),
            gpus=host.gpus,
            rdma=host.rdma,
            numa_nodes=host.layout.nodes,
            numa_cpus=host.layout.cpus,
            classes=tuple((gpu, device, name) for (gpu, device), name in host.layout.classes.items()),
            missing_packages=tuple(sorted(host.missing_packages)),
            gpus_by=host.gpus_by,
            rdma_by=host.rdma_by,
            address=host.address,
            program=host.program,
            packages={name: package[1] for name, package in found.items() if package is not None},
        )
    )


def decode_facts(text: bytes) -> Host:
    """The host that `encode_facts` told of. Raises PdctlError for something else."""
    try:
        facts = msgspec.json.decode(text, type=_Facts)
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise PdctlError(f"these are not the facts of a machine: {failure}") from failure
    return Host(
        cpus=facts.cpus,
        gpus=facts.gpus,
        memory=facts.memory,
        listening={},
        python=facts.python,
        cache_root=Path(facts.cache_root),
        run_root=Path(facts.run_root),
        state_root=Path(facts.state_root),
        rdma=facts.rdma,
        layout=Layout(facts.numa_nodes, facts.numa_cpus, {(gpu, device): name for gpu, device, name in facts.classes}),
        missing_packages=frozenset(facts.missing_packages),
        gpus_by=facts.gpus_by,
        rdma_by=facts.rdma_by,
        address=facts.address,
        program=facts.program,
        package_in=_Packages(facts.python, facts.packages),
    )
