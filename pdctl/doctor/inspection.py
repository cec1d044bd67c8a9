"""From a machine and a topology to findings: read the facts that each area needs and pass them to its checks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pdctl.adapters import launcher
from pdctl.doctor import Area, Finding
from pdctl.errors import ConfigError, PdctlError
from pdctl.host import Host, read_host, state_root
from pdctl.host.address import address_of
from pdctl.host.boot import boot_id
from pdctl.host.devices.gpu_health import GpuReport, read_gpu_facts
from pdctl.host.devices.rdma import RdmaTree, read_tree
from pdctl.host.devices.sysfs import Reader
from pdctl.host.models import read_shape
from pdctl.host.processes.ports import listeners_of
from pdctl.host.processes.presence import supervisor_of
from pdctl.host.processes.stamps import stamped
from pdctl.host.users import run_root
from pdctl.plan import Plan, ProcessSpec, Share, make_plan
from pdctl.topology.loader import check_part, load_cluster_text, load_file, load_imagined
from pdctl.topology.spec import Cluster, Device, EngineGroup, Expect, Topology
from pdctl.wire import UNIT_ENV

if TYPE_CHECKING:
    from pdctl.doctor.areas.affinity import AffinityFacts
    from pdctl.doctor.counters import Sample

_SYS = Path("/sys")


@dataclass(frozen=True, slots=True)
class Where:
    """What to inspect. `file`: the topology, None for none; `is_running`: its service is up; `remembers`: store
    counters for the next run. Of a topology for several machines, this one is `node` and runs `engines`; None: those
    that run here now."""

    file: Path | None = None
    node: str = ""
    engines: frozenset[str] | None = None
    is_running: bool = False
    sysfs_root: Path = _SYS
    kernel_log: Path = Path("/dev/kmsg")
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    remembers: bool = True


class Inspection:
    """One inspection of a machine. Each fact is read once, when the first area needs it."""

    def __init__(self, where: Where) -> None:
        self.where = where
        self.reader = Reader()
        self.host: Host = read_host(sysfs_root=where.sysfs_root)
        self.topology: Topology | None = None
        # The topology of all machines, if it is for several; `topology` is this one's part then.
        self.whole: Topology | None = None
        self.plan: Plan | None = None
        self.refusals: list[Finding] = []
        # Set if the topology was refused for its GPUs: then GPUs are needed.
        self._lacks_gpus = False
        self._tree: RdmaTree | None = None
        self._gpus: GpuReport | None = None
        if where.file is not None:
            self._load(where.file)

    def use(self, text: str, source: str, cluster: Cluster) -> None:
        """Inspect for a topology for several machines. `cluster`: what this machine's own file says of that."""
        self._accept(source, lambda: self._load_part(replace(load_cluster_text(text, source), cluster=cluster)))

    def _load(self, file: Path) -> None:
        with contextlib.suppress(ConfigError, PdctlError):
            imagined = load_imagined(file)
            if imagined.cluster is not None:
                return self._accept(str(file), lambda: self._load_part(imagined))
        return self._accept(str(file), lambda: self._load_whole(file))

    def _accept(self, source: str, load: Callable[[], None]) -> None:
        """Load a topology; the reasons why it is refused are findings."""
        from pdctl.doctor import Severity
        from pdctl.doctor.areas.topology import problems

        try:
            load()
        except ConfigError as failure:
            self.refusals = problems(failure.source, failure.problems)
            self._lacks_gpus = any("GPU" in found.message and "CPU" not in found.message for found in failure.problems)
        except PdctlError as failure:
            # The topology is valid but does not fit this machine.
            self.refusals = [
                Finding("topology.invalid", Severity.CRITICAL, source, failure.message, fix=failure.hint or "")
            ]

    def _load_whole(self, file: Path) -> None:
        """A topology for this machine alone. Raises ConfigError, PdctlError."""
        self.topology = load_file(file, self.host)
        self.plan = make_plan(self.topology, self.host)

    def _load_part(self, whole: Topology) -> None:
        """This machine's part of a topology for several. Raises ConfigError, PdctlError."""
        assert whole.cluster is not None
        self.whole = whole
        address = address_of(whole.cluster.interface)
        self.host = replace(self.host, address=address)
        running = _engines_in(run_root() / whole.service.name)
        share = Share(self.where.node, running if self.where.engines is None else self.where.engines)
        self.topology = share.of(whole, address)
        check_part(whole, self.topology, self.host)
        self.plan = make_plan(whole, self.host, None, share)

    def findings(self, areas: tuple[Area, ...]) -> list[Finding]:
        """The findings of these areas, in order."""
        looks = {
            Area.TOPOLOGY: self._topology, Area.RDMA: self._rdma, Area.GPU: self._gpu, Area.HOST: self._host,
            Area.NET: self._net, Area.RUNTIME: self._runtime, Area.CLUSTER: self._cluster,
        }  # fmt: skip
        # A refused topology is always reported, because the areas could not take it into account.
        found = [*self.refusals, *(finding for area, look in looks.items() if area in areas for finding in look())]
        return list(dict.fromkeys(found))

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def tree(self) -> RdmaTree:
        """The RDMA devices."""
        if self._tree is None:
            self._tree = read_tree(self.where.sysfs_root, reader=self.reader)
        return self._tree

    @property
    def gpus(self) -> GpuReport:
        """The GPUs and their health."""
        if self._gpus is None:
            self._gpus = read_gpu_facts()
        return self._gpus

    @property
    def started(self) -> list[EngineGroup]:
        """Engine groups that pdctl would start."""
        return [group for group in self.topology.engines if not group.is_attached] if self.topology else []

    @property
    def wants_rdma(self) -> bool:
        """Whether the topology requires RDMA, so that TCP would be a fallback."""
        found = self.topology
        asks = found is not None and (found.transfer.protocol == "rdma" or bool(found.transfer.devices))
        # Attached engines have their own transports.
        return asks and bool(self.started)

    def _environments(self) -> list[dict[str, str]]:
        """The environment of each group: pdctl's own plus the group's variables."""
        own = [{**self.where.env, **dict(group.env)} for group in self.started]
        return own or [self.where.env]

    def _placed(self) -> dict[int, dict[str, int]]:
        """The number of engines per GPU and group in the plan."""
        index = {gpu.uuid: gpu.index for gpu in self.host.gpus}
        found: dict[int, dict[str, int]] = {}
        for spec in self.plan.processes if self.plan else ():
            for uuid in spec.gpus:
                groups = found.setdefault(index.get(uuid, -1), {})
                groups[spec.group] = groups.get(spec.group, 0) + 1
        return found

    def _backend(self) -> str:
        return self.topology.transfer.backend if self.topology else ""

    def _model(self) -> Path | None:
        folder = Path(self.plan.model_path) if self.plan and self.plan.model_ready else None
        return folder if folder and folder.is_dir() else None

    # -- areas ---------------------------------------------------------------------------------------------

    def _topology(self) -> Iterator[Finding]:
        from pdctl.doctor.areas.topology import TopologyFacts, check

        if self.topology is not None:
            yield from check(TopologyFacts(self.whole or self.topology, self.host, self._model(), self._placed()))

    def _rdma(self) -> Iterator[Finding]:
        from pdctl.doctor.areas import kernel, rdma
        from pdctl.host.kernel_log import read_kernel_log

        devices = self.topology.transfer.devices if self.topology else ()
        expect = self.topology.expect if self.topology else Expect()
        for env in self._environments():
            wanted = rdma.Wanted(devices, self.wants_rdma, expect)
            root = self.where.sysfs_root
            facts = rdma.RdmaFacts(self.tree, wanted, env, root, self.reader, has_nodes=root == _SYS)
            yield from rdma.check(facts)
        if self.tree.devices:
            yield from self._since_last_time()
            yield from self._pcie()
        is_named = self.where.kernel_log != Path("/dev/kmsg")
        # This kernel log does not belong to another machine's sysfs tree.
        if is_named or (self.where.sysfs_root == _SYS and (self.tree.devices or self.gpus.gpus)):
            log = read_kernel_log(self.where.kernel_log)
            yield from kernel.check(log, log.taken_at, self._unused())

    def _unused(self) -> frozenset[str]:
        """PCI addresses of devices and GPUs that the topology does not use."""
        names = set(self.topology.transfer.devices) if self.topology else set()
        placed = self._placed()
        devices = {d.pci for d in self.tree.devices if d.pci and names and d.name not in names}
        gpus = {found.gpu.pci for found in self.gpus.gpus if placed and found.gpu.index not in placed}
        return frozenset(address.lower() for address in devices | gpus)

    def sample(self) -> Sample:
        """A new sample of the port counters."""
        from pdctl.doctor.counters import sample

        self._tree = None
        at = time.clock_gettime(time.CLOCK_BOOTTIME)
        return sample(self.tree, boot_id(), at, self.where.sysfs_root, self.reader)

    def _since_last_time(self) -> Iterator[Finding]:
        from pdctl.doctor.counters import Kept, compare

        kept = Kept(state_root() / "doctor", self.where.sysfs_root)
        now, before = self.sample(), kept.last()
        if before is not None:
            names = set(self.topology.transfer.devices) if self.topology else set()
            yield from (f for f in compare(before, now) if not names or f.subject.partition(":")[0] in names)
        if self.where.remembers:
            kept.keep(now)

    def _pcie(self) -> Iterator[Finding]:
        from pdctl.doctor.areas.pcie import PcieFacts, check

        names = set(self.topology.transfer.devices) if self.topology else set()
        functions = {d.name: d.pci for d in self.tree.devices if d.pci and (not names or d.name in names)}
        unused = self._unused()
        functions |= {
            f"GPU {found.gpu.index}": found.gpu.pci
            for found in self.gpus.gpus
            if found.gpu.pci and found.gpu.pci.lower() not in unused
        }
        cuda = any(group.device is Device.CUDA for group in self.started)
        mooncake = self.topology is not None and self.topology.transfer.backend == "mooncake"
        yield from check(
            PcieFacts(functions, self.wants_rdma and cuda, self.where.env, mooncake, self.where.sysfs_root,
                      reader=self.reader)
        )  # fmt: skip

    def _gpu(self) -> Iterator[Finding]:
        from pdctl.doctor.areas import affinity
        from pdctl.doctor.areas.gpu import GpuFacts, check
        from pdctl.doctor.areas.runtime import cuda_of_torch

        report = self.gpus
        ours = frozenset(self._children()) if any(g.users for g in report.gpus) else frozenset()
        runtime = cuda_of_torch() if report.gpus else None
        placed = self._placed()
        facts = GpuFacts(
            report,
            frozenset(placed) if placed else None,
            bool(placed) or self._lacks_gpus,
            frozenset(gpu for gpu, groups in placed.items() if sum(groups.values()) > 1),
            ours,
            {gpu: self._wanted(groups) for gpu, groups in placed.items()},
            runtime,
        )
        yield from check(facts)
        yield from affinity.check(self.affinity())

    def _wanted(self, groups: dict[str, int]) -> int:
        """Bytes of KV and weights of the engines on one GPU."""
        model = self._model()
        shape = read_shape(model) if model else None
        weights = shape.weight_bytes if shape else 0
        size = {group.name: int(group.kv_cache_gb * 2**30) for group in self.started}
        return sum((size[name] + weights) * count for name, count in groups.items())

    def affinity(self) -> AffinityFacts:
        """The facts about the distances between GPUs and RDMA devices."""
        from pdctl.doctor.areas.affinity import AffinityFacts

        gpus = tuple((f"GPU {gpu.index}", gpu.pci, gpu.uuid) for gpu in self.host.gpus)
        return AffinityFacts(
            gpus, tuple(device.name for device in self.host.rdma if device.is_active), self.host.layout, self.plan
        )

    def _host(self) -> Iterator[Finding]:
        from pdctl.doctor.areas.host import HostFacts, check

        on_cpu = [group for group in self.started if group.device is Device.CPU]
        model = self._model()
        shape = read_shape(model) if model else None
        # Weights are float32 on the CPU: twice the size in the files, for each engine.
        weights = 2 * shape.weight_bytes * sum(group.replicas for group in on_cpu) if shape else 0
        idle = 0 if self.where.is_running else 1
        yield from check(
            HostFacts(
                sysfs_root=self.where.sysfs_root,
                env=self.where.env,
                pinned_bytes=max((int(g.kv_cache_gb * 2**30) for g in self.started), default=0) * self.wants_rdma,
                shared_bytes=_pools(self.started) * idle,
                weight_bytes=weights * idle,
                children=self._children(),
            )
        )

    def _children(self) -> tuple[int, ...]:
        """Pids of the topology's service if it is running."""
        return tuple(our_processes(self.plan.run_dir)) if self.plan and self.where.is_running else ()

    def _net(self) -> Iterator[Finding]:
        from pdctl.doctor.areas.net import NetFacts, check

        yield from check(NetFacts(self.topology, self.host, self.where.env, self.where.is_running))

    def _runtime(self) -> Iterator[Finding]:
        from pdctl.doctor.areas import environment, runtime

        cuda = any(group.device is Device.CUDA for group in self.started)
        ours = [group for group in self.started if launcher(group.kind).packages]
        builtin = bool(ours) if self.topology else bool(self.host.python)
        mooncake = self.topology is not None and self.topology.transfer.backend == "mooncake"
        facts = runtime.RuntimeFacts(self.where.env, self.wants_rdma and mooncake, cuda, builtin)
        for python in dict.fromkeys(group.python or self.host.python for group in ours) or [self.host.python]:
            yield from runtime.check(facts if python == self.host.program else runtime.elsewhere(facts, python))
        up = {device.name: device.is_active for device in self.host.rdma}
        for env in self._environments():
            yield from environment.check(environment.EnvironmentFacts(env, self.wants_rdma, up, self._backend()))

    def _cluster(self) -> Iterator[Finding]:
        from pdctl.doctor.areas.cluster import ClusterFacts, check

        if self.whole is None or self.whole.cluster is None:
            return
        run_dir = run_root() / self.whole.service.name
        agent = supervisor_of(run_dir)
        pids = [*our_processes(str(run_dir)), *([agent] if agent else [])]
        ours = {port: f"{spec.name} {purpose}" for spec in _planned(run_dir) for purpose, port in spec.ports.items()}
        ours[self.whole.cluster.agent_port] = "agent"
        yield from check(ClusterFacts(self.whole, self.whole.cluster, listeners_of(pids), ours))


def _planned(run_dir: Path) -> tuple[ProcessSpec, ...]:
    """What the supervisor of this run directory runs; nothing if there is none."""
    try:
        return msgspec.json.decode((run_dir / "plan.json").read_bytes(), type=Plan).processes
    except (OSError, msgspec.DecodeError):
        return ()


def _engines_in(run_dir: Path) -> frozenset[str]:
    """The names of the engines that run there."""
    return frozenset(spec.name for spec in _planned(run_dir) if spec.is_engine)


def _pools(groups: list[EngineGroup]) -> int:
    """Total bytes of these engines' KV pools."""
    return int(sum(group.kv_cache_gb * group.replicas for group in groups) * 2**30)


def our_processes(run_dir: str, proc_root: Path = Path("/proc")) -> list[int]:
    """Processes that the supervisor of this run directory started, found by the stamp in their environment."""
    return stamped(f"{UNIT_ENV}={run_dir}:", proc_root)
