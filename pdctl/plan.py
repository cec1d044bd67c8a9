"""(Topology, Host) to Plan: for every process its command, environment, ports, pins, order and probe.

Pure: the same topology on the same host gives the same plan, and nothing is started or written.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pdctl.adapters import Assignment, launcher
from pdctl.errors import PdctlError
from pdctl.host import Host
from pdctl.host.models import ModelLocation, locate_model
from pdctl.topology import Device, EngineGroup, Proxy, Topology

# Engines' ports: each service starts looking at its own place, so that two that start at once do not meet.
_ENGINE_PORTS = range(18100, 26100)
_PORTS_PER_SERVICE = 16
# Reading a large model from a slow disk takes minutes; a start that takes longer than this has failed.
_STARTUP_S = 1800.0


@dataclass(frozen=True, slots=True)
class Probe:
    """Ready when a GET of `url` answers 200. Seconds throughout."""

    url: str
    interval_s: float
    timeout_s: float
    startup_s: float


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to be. `env` is added to ours; `listen` is a socket the supervisor binds and hands down."""

    name: str
    kind: str
    role: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(hash=False)
    device: str
    cpus: tuple[int, ...]
    gpus: tuple[str, ...]
    ports: dict[str, int] = field(hash=False)
    depends_on: tuple[str, ...]
    probe: Probe
    listen: tuple[str, int] | None


@dataclass(frozen=True, slots=True)
class Attached:
    """An engine that runs already, here or elsewhere: used, and not started."""

    name: str
    role: str
    kind: str
    host: str
    port: int
    secret_file: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `pdctl up` will start, and where it will put it."""

    service: str
    model: str
    model_path: str
    model_ready: bool
    served_model_name: str
    max_model_len: int
    proxy: Proxy
    ttft_ms: float
    tpot_ms: float
    proxy_url: str
    run_dir: str
    log_dir: str
    grace_s: float
    max_restarts: int
    within_s: float
    processes: tuple[ProcessSpec, ...]
    attached: tuple[Attached, ...]

    def to_dict(self) -> dict[str, object]:
        """For `--json` and for handing a plan to a detached supervisor."""
        return asdict(self)


def make_plan(topology: Topology, host: Host) -> Plan:
    """Lay out every process of `topology` on `host`. Raises PdctlError when it does not fit."""
    base = Path(topology.source).parent if topology.source else Path()
    model = _model(topology, host, base)
    run_dir = host.run_root / topology.service.name
    engines = _engines(topology, host, model.path, run_dir)
    proxies = _proxies(topology, host, run_dir, engines)
    return Plan(
        service=topology.service.name,
        model=topology.service.model,
        model_path=model.path,
        model_ready=model.ready,
        served_model_name=topology.service.served_model_name,
        max_model_len=topology.service.max_model_len,
        proxy=topology.proxy,
        ttft_ms=topology.slo.ttft_ms,
        tpot_ms=topology.slo.tpot_ms,
        proxy_url=f"{_scheme(topology)}://{_reachable(topology.proxy.host)}:{topology.proxy.port}",
        run_dir=str(run_dir),
        log_dir=str(host.state_root / topology.service.name / "logs"),
        grace_s=topology.supervision.grace_s,
        max_restarts=topology.supervision.max_restarts,
        within_s=topology.supervision.within_s,
        processes=(*engines, *proxies),
        attached=tuple(_attached(group) for group in topology.engines if group.is_attached),
    )


def _model(topology: Topology, host: Host, base: Path) -> ModelLocation:
    """Where the model lies. Where every engine runs already, only its name matters."""
    if all(group.is_attached for group in topology.engines):
        return ModelLocation(topology.service.model, topology.service.model, ready=True)
    return locate_model(topology.service.model, host.cache_root, base)


def _attached(group: EngineGroup) -> Attached:
    host, _, port = group.url.removeprefix("http://").rpartition(":")
    return Attached(group.name, group.role.value, group.kind, host.strip("[]"), int(port), group.secret_file)


def _engines(topology: Topology, host: Host, model_path: str, run_dir: Path) -> list[ProcessSpec]:
    taken = {topology.proxy.port, *host.listening}
    gpu_of = _assign_gpus(topology, host)
    specs = []
    for group in topology.engines:
        for name in () if group.is_attached else group.replica_names():
            port = _free_port(taken, run_dir)
            taken.add(port)
            assignment = Assignment(name, group, port, gpu_of.get(name), model_path, run_dir, host.python)
            specs.append(_engine(topology, host, assignment))
    return specs


def _engine(topology: Topology, host: Host, assignment: Assignment) -> ProcessSpec:
    group = assignment.group
    launch = launcher(group.kind).launch(topology, assignment)
    url = f"http://127.0.0.1:{assignment.port}{launch.ready_path}"
    return ProcessSpec(
        name=assignment.name,
        kind=group.kind,
        role=group.role.value,
        argv=launch.argv,
        env=launch.env,
        device=group.device.value,
        cpus=_replica_cpus(group, assignment.name) or host.cpus,
        gpus=(assignment.gpu_uuid,) if assignment.gpu_uuid else (),
        ports={"http": assignment.port},
        depends_on=(),
        probe=Probe(url, interval_s=0.1, timeout_s=2.0, startup_s=_STARTUP_S),
        listen=None,
    )


def _replica_cpus(group: EngineGroup, name: str) -> tuple[int, ...]:
    """Each replica its own equal share where the group's CPUs divide evenly, else all of them."""
    index = group.replica_names().index(name)
    share, rest = divmod(len(group.cpus), group.replicas)
    return group.cpus[index * share : (index + 1) * share] if share and not rest else group.cpus


def _proxies(topology: Topology, host: Host, run_dir: Path, engines: list[ProcessSpec]) -> list[ProcessSpec]:
    """One process, or `workers` of them on one socket."""
    workers = topology.proxy.workers
    taken = {topology.proxy.port, *host.listening, *(port for spec in engines for port in spec.ports.values())}
    specs = []
    for worker in range(workers):
        ports = {"http": topology.proxy.port}
        if workers > 1 or topology.proxy.tls_cert:
            # Who answers on the shared socket is chance, and TLS is for clients: this one is asked by itself.
            ports["control"] = _free_port(taken, run_dir)
            taken.add(ports["control"])
        specs.append(_proxy(topology, host, run_dir, worker, ports, tuple(spec.name for spec in engines)))
    return specs


def _proxy(
    topology: Topology, host: Host, run_dir: Path, worker: int, ports: dict[str, int], engines: tuple[str, ...]
) -> ProcessSpec:
    argv = [host.python, "-m", "pdctl.proxy", "--config", str(run_dir / "proxy.json")]
    url = f"http://{_reachable(topology.proxy.host)}:{topology.proxy.port}/health"
    if "control" in ports:
        argv += ["--worker", str(worker), "--control-port", str(ports["control"])]
        url = f"http://127.0.0.1:{ports['control']}/health"
    return ProcessSpec(
        name="proxy" if topology.proxy.workers == 1 else f"proxy-{worker}",
        kind="proxy",
        role="proxy",
        argv=tuple(argv),
        env={},
        device="cpu",
        cpus=topology.proxy.cpus or host.cpus,
        gpus=(),
        ports=ports,
        depends_on=engines,
        probe=Probe(url, interval_s=0.05, timeout_s=2.0, startup_s=60.0),
        listen=(topology.proxy.host, topology.proxy.port),
    )


def _scheme(topology: Topology) -> str:
    return "https" if topology.proxy.tls_cert else "http"


def _assign_gpus(topology: Topology, host: Host) -> dict[str, str]:
    """Engine name -> GPU UUID: named ones first, then the free ones in order."""
    by_index = {gpu.index: gpu.uuid for gpu in host.gpus}
    cuda = [group for group in topology.engines if group.device is Device.CUDA and not group.is_attached]
    named = {index for group in cuda for index in group.gpus}
    free = [gpu.uuid for gpu in host.gpus if gpu.index not in named]
    chosen: dict[str, str] = {}
    for group in cuda:
        for position, name in enumerate(group.replica_names()):
            if group.gpus:
                chosen[name] = by_index[group.gpus[position % len(group.gpus)]]
            elif free:
                chosen[name] = free.pop(0)
            elif group.share_gpu and host.gpus:
                chosen[name] = host.gpus[position % len(host.gpus)].uuid
            else:
                hint = "lower replicas, or set share_gpu = true on engines that may share"
                raise PdctlError(f"no GPU is left for {name}: the machine has {len(host.gpus)}", hint)
    return chosen


def _free_port(taken: set[int], run_dir: Path) -> int:
    places: int = len(_ENGINE_PORTS) // _PORTS_PER_SERVICE
    first = zlib.crc32(str(run_dir).encode()) % places * _PORTS_PER_SERVICE
    wanted: list[int] = [*_ENGINE_PORTS[first:], *_ENGINE_PORTS[:first]]
    for port in wanted:
        if port not in taken:
            return port
    raise PdctlError(f"no free port from {_ENGINE_PORTS.start} to {_ENGINE_PORTS.stop - 1} for an engine")


def _reachable(host: str) -> str:
    """An address on this machine for a listener on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
