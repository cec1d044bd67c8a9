"""(Topology, Host) to Plan: the command, environment, ports, pins, start order and probe of every process.

Pure: the same topology on the same host gives the same plan. Nothing is started or written.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pdctl.adapters import Assignment, Launch, control, launcher
from pdctl.host import Host
from pdctl.host.models import ModelLocation, locate_model
from pdctl.net import LOOPBACK, reachable
from pdctl.plan.gpus import assign_gpus
from pdctl.plan.pins import Pins, pins_of
from pdctl.plan.ports import PortSearch, free_ports
from pdctl.topology.spec import EngineGroup, Proxy, Supervision, Topology

# A proxy that does not listen after this long will never do so, seconds.
_PROXY_STARTUP_S = 60.0


@dataclass(frozen=True, slots=True)
class Probe:
    """How to check that a process is ready and alive. All times are in seconds.

    `ready`: tcp:HOST:PORT, http://..., log:PATTERN, or "" for ready at once. `alive`: URL to probe from then on, or "".
    `state`: URL of an engine's counts of running requests and tokens, or "". `generate`: URL that generates one token
    for a POST of `generate_body`; with `ready_generates`, the process is ready only once it has done so.
    """

    ready: str
    alive: str
    state: str
    generate: str
    interval_s: float
    timeout_s: float
    startup_s: float
    generate_body: str = ""
    ready_generates: bool = False


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to start. `env` is added to the supervisor's environment; `listen`: the socket that the supervisor
    binds and passes to the process.

    `host`: the address at which other processes reach its `ports`.
    `restart_with`: processes that, when they exit, restart this one too; `why`: the reason for each choice, by field.
    `api_key_env`: the variable in which the process gets the run's secret as its API key, "" for none.
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
    host: str = LOOPBACK
    api_key_env: str = ""

    def digest(self) -> str:
        """Hash of everything that cannot change while the process runs. Specs with equal digests need no restart."""
        ports = sorted(self.ports.items())
        env = (*sorted(self.env.items()), self.api_key_env)
        fixed = (self.argv, env, self.role, self.cpus, self.gpus, ports, self.listen)
        return hashlib.blake2b(repr(fixed).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Attached:
    """An engine that is already running, here or on another host. pdctl uses it but does not start it. `ports`: those
    beside its API, by purpose."""

    name: str
    role: str
    kind: str
    host: str
    port: int
    secret_file: str
    ports: dict[str, int] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `pdctl up` starts, and where."""

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
    lease_s: float = 30.0

    def to_dict(self) -> dict[str, object]:
        """The plan for `--json` and for a detached supervisor."""
        return asdict(self)


def make_plan(topology: Topology, host: Host, running: Plan | None = None) -> Plan:
    """Place every process of `topology` on `host`. Raises PdctlError if it does not fit.

    Processes with the same name in `running` keep their ports and GPUs, so that they need no restart for these.
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
        proxy_url=f"{_scheme(topology)}://{_in_url(topology.proxy.host)}:{topology.proxy.port}",
        run_dir=str(run_dir),
        log_dir=str(host.state_root / topology.service.name / "logs"),
        supervision=topology.supervision,
        processes=(*engines, *proxies),
        attached=tuple(_attached(group) for group in topology.engines if group.is_attached),
        source=str(Path(topology.source).absolute()) if topology.source else "",
        text=topology.text,
        lease_s=topology.transfer.lease_s,
    )


def _model(topology: Topology, host: Host, base: Path) -> ModelLocation:
    """The model's location. If all engines are attached, only its name matters."""
    if all(group.is_attached for group in topology.engines):
        return ModelLocation(topology.service.model, topology.service.model, ready=True)
    return locate_model(topology.service.model, host.cache_root, base)


def _attached(group: EngineGroup) -> Attached:
    host, _, port = group.url.removeprefix("http://").rpartition(":")
    ports = {"bootstrap": group.bootstrap_port} if group.bootstrap_port else {}
    return Attached(group.name, group.role.value, group.kind, host.strip("[]"), int(port), group.secret_file, ports)


Kept = dict[str, ProcessSpec]


def _engines(topology: Topology, host: Host, model_path: str, run_dir: Path, kept: Kept) -> list[ProcessSpec]:
    taken = {topology.proxy.port, *host.listening, *(port for spec in kept.values() for port in spec.ports.values())}
    gpus_of = assign_gpus(topology, host, {name: spec.gpus for name, spec in kept.items()}, run_dir)
    search = PortSearch(run_dir, topology.service.engine_ports)
    specs = []
    for group in topology.engines:
        for name in () if group.is_attached else group.replica_names():
            before = kept[name].ports if name in kept else {}
            ports = free_ports(("http", *launcher(group.kind).ports(group)), before, taken, search)
            gpus = gpus_of.get(name, ())
            pins = pins_of(topology, host, group, name, gpus, str(run_dir))
            python = group.python or host.python
            assignment = Assignment(
                name=name,
                group=group,
                host=host.address,
                ports=ports,
                gpus=gpus,
                rdma=pins.rdma,
                model_path=model_path,
                run_dir=run_dir,
                python=python,
                cpus=pins.cpus,
                package=host.package_in(python, launcher(group.kind).distributions) or ("", ""),
            )
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
        gpus=assignment.gpus,
        ports=assignment.ports,
        depends_on=(),
        probe=_engine_probe(topology, group, launch, f"{assignment.host}:{assignment.ports['http']}"),
        listen=None,
        group=group.name,
        restart_with=_peers(topology, group),
        rdma=pins.rdma,
        why=pins.why,
        host=assignment.host,
        api_key_env=launch.api_key_env,
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
        state=f"{base}{progress_path}" if (progress_path := control(group.kind).progress_path) else "",
        generate=f"{base}{launch.generate_path}" if launch.generate_path else "",
        interval_s=0.1,
        # A front that shares its cores with engines may answer late once; a dead one fails three times in a row.
        timeout_s=5.0,
        startup_s=topology.supervision.startup_s,
        generate_body=launch.generate_body,
        ready_generates=launch.ready_generates and not group.ready,
    )


def _peers(topology: Topology, group: EngineGroup) -> tuple[str, ...]:
    """Processes that, when they exit, restart the processes of this group."""
    return tuple(
        name for other in topology.engines if other.name in group.restart_with for name in other.replica_names()
    )


def _proxies(
    topology: Topology, host: Host, run_dir: Path, engines: list[ProcessSpec], kept: Kept
) -> list[ProcessSpec]:
    """The proxy processes: one, or `workers` of them on one listening socket."""
    workers = topology.proxy.workers
    known = (*engines, *kept.values())
    taken = {topology.proxy.port, *host.listening, *(port for spec in known for port in spec.ports.values())}
    specs = []
    for worker in range(workers):
        name = "proxy" if workers == 1 else f"proxy-{worker}"
        ports = {"http": topology.proxy.port}
        if workers > 1 or topology.proxy.tls_cert:
            # Any worker may answer on the shared socket, and it may use TLS: the supervisor needs a port per worker.
            before = {"control": kept[name].ports.get("control", 0)} if name in kept else {}
            ports |= free_ports(("control",), before, taken, PortSearch(run_dir, topology.service.engine_ports))
        specs.append(_proxy(topology, host, run_dir, worker, ports, tuple(spec.name for spec in engines)))
    return specs


def _proxy(
    topology: Topology, host: Host, run_dir: Path, worker: int, ports: dict[str, int], engines: tuple[str, ...]
) -> ProcessSpec:
    argv = [host.python, "-m", "pdctl.proxy", "--config", str(run_dir / "proxy.json")]
    base = f"http://{_in_url(topology.proxy.host)}:{topology.proxy.port}"
    if "control" in ports:
        argv += ["--worker", str(worker), "--control-port", str(ports["control"])]
        base = f"http://{host.address}:{ports['control']}"
    # /health also depends on the engines, so liveness uses a path that answers whenever the proxy runs.
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
        host=host.address,
    )


def _scheme(topology: Topology) -> str:
    return "https" if topology.proxy.tls_cert else "http"


def _in_url(host: str) -> str:
    """A listener's address as part of a URL on this machine."""
    address = reachable(host)
    return f"[{address}]" if ":" in address else address
