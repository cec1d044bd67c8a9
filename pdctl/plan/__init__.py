"""(Topology, Host) to Plan: for every process its command, environment, ports, pins, order and probe.

Pure: the same topology on the same host gives the same plan, and nothing is started or written.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pdctl.adapters import Assignment, Launch, launcher
from pdctl.errors import PdctlError
from pdctl.host import Host
from pdctl.host.models import ModelLocation, locate_model
from pdctl.plan.pins import Pins, pins_of
from pdctl.topology.spec import Device, EngineGroup, Proxy, Supervision, Topology

# Engines' ports: each service starts looking at its own place, so that two that start at once do not meet.
_ENGINE_PORTS = range(18100, 26100)
_PORTS_PER_SERVICE = 16
# A proxy that needs longer than this to listen will never do so.
_PROXY_STARTUP_S = 60.0


@dataclass(frozen=True, slots=True)
class Probe:
    """When a process is ready, and whether it still lives. Seconds throughout.

    `ready`: tcp:HOST:PORT, http://..., log:PATTERN, or "" for at once. `alive`: an address to be asked from then on, or
    "". `state`: where an engine tells its running requests and tokens, or "". `generate`: where one token can be had.
    """

    ready: str
    alive: str
    state: str
    generate: str
    interval_s: float
    timeout_s: float
    startup_s: float


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to be. `env` is added to ours; `listen` is a socket the supervisor binds and hands down.

    `restart_with`: names whose exit restarts this one; `why`: the reason for each choice, by the key it answers.
    """

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
    group: str = ""
    restart_with: tuple[str, ...] = ()
    rdma: tuple[str, ...] = ()
    why: dict[str, str] = field(default_factory=dict, hash=False)

    def digest(self) -> str:
        """Names everything that a running process cannot change. Two specs of one digest are one process."""
        fixed = (self.argv, sorted(self.env.items()), self.cpus, self.gpus, sorted(self.ports.items()), self.listen)
        return hashlib.blake2b(repr(fixed).encode(), digest_size=8).hexdigest()


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
    supervision: Supervision
    processes: tuple[ProcessSpec, ...]
    attached: tuple[Attached, ...]
    source: str = ""
    text: str = ""

    def to_dict(self) -> dict[str, object]:
        """For `--json` and for handing a plan to a detached supervisor."""
        return asdict(self)


def make_plan(topology: Topology, host: Host, running: Plan | None = None) -> Plan:
    """Lay out every process of `topology` on `host`. Raises PdctlError when it does not fit.

    What `running` has of the same name keeps its ports and GPUs, so that it need not be restarted for them.
    """
    base = Path(topology.source).parent if topology.source else Path()
    model = _model(topology, host, base)
    run_dir = host.run_root / topology.service.name
    kept = {spec.name: spec for spec in running.processes} if running else {}
    engines = _engines(topology, host, model.path, run_dir, kept)
    proxies = _proxies(topology, host, run_dir, engines, kept)
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
        supervision=topology.supervision,
        processes=(*engines, *proxies),
        attached=tuple(_attached(group) for group in topology.engines if group.is_attached),
        source=str(Path(topology.source).absolute()) if topology.source else "",
        text=topology.text,
    )


def _model(topology: Topology, host: Host, base: Path) -> ModelLocation:
    """Where the model lies. Where every engine runs already, only its name matters."""
    if all(group.is_attached for group in topology.engines):
        return ModelLocation(topology.service.model, topology.service.model, ready=True)
    return locate_model(topology.service.model, host.cache_root, base)


def _attached(group: EngineGroup) -> Attached:
    host, _, port = group.url.removeprefix("http://").rpartition(":")
    return Attached(group.name, group.role.value, group.kind, host.strip("[]"), int(port), group.secret_file)


Kept = dict[str, ProcessSpec]


def _engines(topology: Topology, host: Host, model_path: str, run_dir: Path, kept: Kept) -> list[ProcessSpec]:
    taken = {topology.proxy.port, *host.listening, *(port for spec in kept.values() for port in spec.ports.values())}
    gpu_of = _assign_gpus(topology, host, kept, run_dir)
    specs = []
    for group in topology.engines:
        for name in () if group.is_attached else group.replica_names():
            port = (
                kept[name].ports["http"] if name in kept else _free_port(taken, run_dir, topology.service.engine_ports)
            )
            taken.add(port)
            gpu = gpu_of.get(name)
            pins = pins_of(topology, host, group, name, gpu, str(run_dir))
            assignment = Assignment(name, group, port, gpu, pins.rdma, model_path, run_dir, host.python)
            specs.append(_engine(topology, assignment, pins))
    return specs


def _engine(topology: Topology, assignment: Assignment, pins: Pins) -> ProcessSpec:
    group = assignment.group
    launch = launcher(group.kind).launch(topology, assignment)
    return ProcessSpec(
        name=assignment.name,
        kind=group.kind,
        role=group.role.value,
        argv=launch.argv,
        env={**launch.env, **dict(group.env)},
        device=group.device.value,
        cpus=pins.cpus,
        gpus=(assignment.gpu_uuid,) if assignment.gpu_uuid else (),
        ports={"http": assignment.port},
        depends_on=(),
        probe=_engine_probe(topology, group, launch, f"127.0.0.1:{assignment.port}"),
        listen=None,
        group=group.name,
        restart_with=_peers(topology, group),
        rdma=pins.rdma,
        why=pins.why,
    )


def _engine_probe(topology: Topology, group: EngineGroup, launch: Launch, address: str) -> Probe:
    base = f"http://{address}"
    ready = f"{base}{launch.ready_path}"
    if group.ready == "tcp":
        ready = f"tcp:{address}"
    elif group.ready:
        ready = group.ready if group.ready.startswith("log:") else base + group.ready.removeprefix("http:")
    return Probe(
        ready,
        alive=f"{base}{launch.ready_path}",
        state=f"{base}{launch.state_path}" if launch.state_path else "",
        generate=f"{base}{launch.generate_path}" if launch.generate_path else "",
        interval_s=0.1,
        # A front that shares its cores with the engines may be late; one that is dead is late three times.
        timeout_s=5.0,
        startup_s=topology.supervision.startup_s,
    )


def _peers(topology: Topology, group: EngineGroup) -> tuple[str, ...]:
    """Processes whose exit restarts this group's."""
    return tuple(
        name for other in topology.engines if other.name in group.restart_with for name in other.replica_names()
    )


def _proxies(
    topology: Topology, host: Host, run_dir: Path, engines: list[ProcessSpec], kept: Kept
) -> list[ProcessSpec]:
    """One process, or `workers` of them on one socket."""
    workers = topology.proxy.workers
    known = (*engines, *kept.values())
    taken = {topology.proxy.port, *host.listening, *(port for spec in known for port in spec.ports.values())}
    specs = []
    for worker in range(workers):
        name = "proxy" if workers == 1 else f"proxy-{worker}"
        ports = {"http": topology.proxy.port}
        if workers > 1 or topology.proxy.tls_cert:
            # Who answers on the shared socket is chance, and TLS is for clients: this one is asked by itself.
            before = kept[name].ports.get("control") if name in kept else None
            ports["control"] = before or _free_port(taken, run_dir, topology.service.engine_ports)
            taken.add(ports["control"])
        specs.append(_proxy(topology, host, run_dir, worker, ports, tuple(spec.name for spec in engines)))
    return specs


def _proxy(
    topology: Topology, host: Host, run_dir: Path, worker: int, ports: dict[str, int], engines: tuple[str, ...]
) -> ProcessSpec:
    argv = [host.python, "-m", "pdctl.proxy", "--config", str(run_dir / "proxy.json")]
    base = f"http://{_reachable(topology.proxy.host)}:{topology.proxy.port}"
    if "control" in ports:
        argv += ["--worker", str(worker), "--control-port", str(ports["control"])]
        base = f"http://127.0.0.1:{ports['control']}"
    # Its health is the engines' too; what answers at all lives.
    url, alive = f"{base}/health", f"{base}/pdctl/v1/pool"
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
        probe=Probe(url, alive, "", "", interval_s=0.05, timeout_s=2.0, startup_s=_PROXY_STARTUP_S),
        listen=(topology.proxy.host, topology.proxy.port),
        group="proxy",
    )


def _scheme(topology: Topology) -> str:
    return "https" if topology.proxy.tls_cert else "http"


def _assign_gpus(topology: Topology, host: Host, kept: Kept, run_dir: Path) -> dict[str, str]:
    """Engine name -> GPU UUID: named ones first, then those that an engine has, then free ones, idle ones before those
    that others compute on, in the environment's order."""
    cuda = [group for group in topology.engines if group.device is Device.CUDA and not group.is_attached]
    named = {gpu.uuid for group in cuda for name in group.gpus if (gpu := host.gpu_named(name)) is not None}
    free = [gpu.uuid for gpu in host.gpus if gpu.uuid not in named]
    free.sort(key=lambda uuid: bool(host.strangers_on(uuid, str(run_dir))))
    chosen: dict[str, str] = {}
    for name in (name for group in cuda if not group.gpus for name in group.replica_names()):
        before = kept[name].gpus if name in kept else ()
        if before and before[0] in free:
            chosen[name] = before[0]
            free.remove(before[0])
    for group in cuda:
        for position, name in enumerate(group.replica_names()):
            if name not in chosen:
                chosen[name] = _gpu_for(group, position, name, host, free)
    return chosen


def _gpu_for(group: EngineGroup, position: int, name: str, host: Host, free: list[str]) -> str:
    if group.gpus:
        gpu = host.gpu_named(group.gpus[position % len(group.gpus)])
        assert gpu is not None, "the loader has looked"
        return gpu.uuid
    if free:
        return free.pop(0)
    if group.share_gpu and host.gpus:
        return host.gpus[position % len(host.gpus)].uuid
    hint = "lower replicas, or set share_gpu = true on engines that may share"
    ours = f"; {host.gpus_by} leaves us {len(host.gpus)}" if host.gpus_by else f": the machine has {len(host.gpus)}"
    raise PdctlError(f"no GPU is left for {name}{ours}", hint)


def _free_port(taken: set[int], run_dir: Path, allowed: tuple[int, ...]) -> int:
    """The first free one of the topology's range, or of our own, in which each service begins at its own place."""
    ports = range(allowed[0], allowed[1] + 1) if allowed else _ENGINE_PORTS
    places = 1 if allowed else len(ports) // _PORTS_PER_SERVICE
    first = zlib.crc32(str(run_dir).encode()) % places * _PORTS_PER_SERVICE
    wanted: list[int] = [*ports[first:], *ports[:first]]
    for port in wanted:
        if port not in taken:
            return port
    hint = "widen service.engine_ports" if allowed else None
    raise PdctlError(f"no free port from {ports.start} to {ports.stop - 1} for an engine", hint)


def _reachable(host: str) -> str:
    """An address on this machine for a listener on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
