"""(Topology, Host) to Plan: the command, environment, ports, pins, start order and probe of every process.

Pure: the same topology on the same host gives the same plan. Nothing is started or written.
"""

from __future__ import annotations

from pathlib import Path

from pdctl import __version__
from pdctl.adapters import Ability, Assignment, Launch, can_launch, control, launcher
from pdctl.host import Host
from pdctl.host.models import ModelLocation, locate_model
from pdctl.net import LOOPBACK, reachable
from pdctl.net.identity import CERTIFICATES_ENV
from pdctl.plan.gpus import assign_gpus
from pdctl.plan.helpers import Site, command_of, in_order, place_of, store_of
from pdctl.plan.pins import Pins, pins_of
from pdctl.plan.share import Share
from pdctl.plan.spec import PROXY, Attached, Plan, Probe, ProcessSpec
from pdctl.proxy_wire import SLOT_BYTES
from pdctl.stores import Reader, StoreClient, store_launcher
from pdctl.topology.spec import EngineGroup, Role, Topology

__all__ = ["Attached", "Plan", "Probe", "ProcessSpec", "Share", "make_plan"]

# Engines that are a part of pdctl.
_OUR_KIND = "builtin"
# A proxy that does not listen after this long will never do so, seconds.
_PROXY_STARTUP_S = 60.0


def make_plan(topology: Topology, host: Host, running: Plan | None = None, share: Share | None = None) -> Plan:
    """Place every process of `topology` on `host`, or of a cluster's topology the node's share. Raises PdctlError if it
    does not fit.

    Processes with the same name in `running` keep their ports and GPUs, so that they need no restart for these.
    """
    if share is not None:
        topology = share.of(topology, host.address)
    base = Path(topology.source).parent if topology.source else Path()
    model = _model(topology, host, base)
    run_dir = host.run_root / topology.service.name
    kept = {spec.name: spec for spec in running.processes} if running else {}
    site = Site(topology, host, run_dir, kept)
    stores = [store_of(site, store) for store in topology.stores]
    commands = [command_of(site, entry) for entry in topology.processes]
    engines = _engines(site, model.path)
    others = in_order([*stores, *commands, *engines])
    attached = tuple(_attached(group, others) for group in topology.engines if group.is_attached)
    proxies = _proxies(site, engines) if share is None or share.has_proxy(topology) else []
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
        processes=(*others, *proxies),
        attached=attached,
        source=str(Path(topology.source).absolute()) if topology.source else "",
        text=topology.text,
        lease_s=topology.transfer.lease_s,
        elastic=topology.elastic,
        dashboard=topology.dashboard,
        node=share.node if share is not None else "",
        certificates=_certificates(topology),
    )


def _certificates(topology: Topology) -> str:
    return topology.cluster.certificates if topology.cluster is not None else ""


def _identity(topology: Topology) -> dict[str, str]:
    """What our own processes need to speak TLS."""
    return {CERTIFICATES_ENV: folder} if (folder := _certificates(topology)) else {}


def _model(topology: Topology, host: Host, base: Path) -> ModelLocation:
    """The model's location. If all engines are attached, only its name matters."""
    if all(group.is_attached for group in topology.engines):
        return ModelLocation(topology.service.model, topology.service.model, ready=True)
    return locate_model(topology.service.model, host.cache_root, base)


def _attached(group: EngineGroup, processes: list[ProcessSpec]) -> Attached:
    if group.process:
        served = next(spec for spec in processes if spec.name == group.process)
        host, port = served.host, next(iter(served.ports.values()))
    else:
        host, _, number = group.url.removeprefix("http://").rpartition(":")
        host, port = host.strip("[]"), int(number)
    ports = {"bootstrap": group.bootstrap_port} if group.bootstrap_port else {}
    role, connector = group.role.value, _connector(group)
    return Attached(group.name, role, group.kind, host, port, group.secret_file, ports, connector)


def _connector(group: EngineGroup) -> str:
    """How the group exchanges KV: as given, else its kind's default; "" for kinds with only one way."""
    connectors = launcher(group.kind).connectors if can_launch(group.kind) else ()
    return group.connector or next(iter(connectors), "")


def _engines(site: Site, model_path: str) -> list[ProcessSpec]:
    topology, host, run_dir = site.topology, site.host, site.run_dir
    gpus_of = assign_gpus(topology, host, {name: spec.gpus for name, spec in site.kept.items()}, run_dir)
    specs = []
    for group in topology.engines:
        for name in () if group.is_attached else group.replica_names():
            gpus = gpus_of.get(name, ())
            pins = pins_of(topology, host, group, name, gpus, str(run_dir))
            python = group.python or host.python
            assignment = Assignment(
                name=name,
                group=group,
                host=host.address,
                ports=site.ports_of(name, ("http", *launcher(group.kind).ports(group))),
                gpus=gpus,
                rdma=pins.rdma,
                model_path=model_path,
                run_dir=run_dir,
                python=python,
                cpus=pins.cpus,
                package=host.package_in(python, launcher(group.kind).distributions) or ("", ""),
                otlp_endpoint=_collector(site, group, python),
            )
            specs.append(_engine(site, assignment, pins))
    return specs


def _collector(site: Site, group: EngineGroup, python: str) -> str:
    """Where an engine exports spans; "" if its kind cannot, or its environment lacks the packages for that."""
    endpoint, needed = site.topology.proxy.otlp_endpoint, launcher(group.kind).tracing
    able = endpoint and needed and all(site.host.package_in(python, (name,)) for name in needed)
    return endpoint if able else ""


def _tracing(assignment: Assignment, topology: Topology) -> dict[str, str]:
    """Variables of OpenTelemetry's SDK, which engines of every kind use."""
    if not assignment.otlp_endpoint:
        return {}
    return {
        "OTEL_SERVICE_NAME": f"pdctl/{topology.service.name}/{assignment.name}",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    }


def _engine(site: Site, assignment: Assignment, pins: Pins) -> ProcessSpec:
    group, topology = assignment.group, site.topology
    launch, client = launcher(group.kind).launch(topology, assignment), _client(site, assignment)
    tls = bool(_certificates(topology)) and launcher(group.kind).certified
    return ProcessSpec(
        name=assignment.name,
        kind=group.kind,
        role=group.role.value,
        argv=launch.argv,
        env={
            **(_identity(topology) if tls else {}),
            **_tracing(assignment, topology),
            **launch.env,
            **client.env,
            **dict(group.env),
        },
        device=group.device.value,
        cpus=pins.cpus,
        gpus=assignment.gpus,
        ports=assignment.ports,
        depends_on=site.members((*group.depends_on, *filter(None, (group.store,)))),
        probe=_engine_probe(topology, group, launch, f"{assignment.host}:{assignment.ports['http']}", tls),
        listen=None,
        group=group.name,
        restart_with=site.members(group.restart_with),
        rdma=pins.rdma,
        why=pins.why,
        host=assignment.host,
        api_key_env=launch.api_key_env,
        connector=_connector(group),
        files=client.files,
        inline=_inline(group),
        switches=Ability.ROLE in control(group.kind).abilities,
        tls=tls,
        version=__version__ if group.kind == _OUR_KIND else "",
        fetches=group.fetch_prefixes != "false",
        kv_events=launch.kv_events,
    )


def _inline(group: EngineGroup) -> bool:
    """Whether the proxy may give a decode engine whole requests: it must predict its steps. An engine of another role
    may become one."""
    settings = launcher(group.kind).settings
    may = group.role is Role.DECODE or Ability.ROLE in control(group.kind).abilities
    return may and group.inline_prefill and "inline_prefill" in settings


def _client(site: Site, assignment: Assignment) -> StoreClient:
    """What an engine needs to use its store, if it has one."""
    if not (name := assignment.group.store):
        return StoreClient({}, {})
    store = next(store for store in site.topology.stores if store.name == name)
    reader = Reader(assignment.name, assignment.host, assignment.rdma, site.topology.transfer, assignment.run_dir)
    return store_launcher(store.kind).client(place_of(site, store), reader)


def _engine_probe(topology: Topology, group: EngineGroup, launch: Launch, address: str, tls: bool) -> Probe:
    base = f"{'https' if tls else 'http'}://{address}"
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


def _proxies(site: Site, engines: list[ProcessSpec]) -> list[ProcessSpec]:
    """The proxy processes: one, or `workers` of them on one listening socket."""
    proxy = site.topology.proxy
    # Engines that are entries of [[processes]] must be ready, too.
    needed = (*(spec.name for spec in engines), *(group.process for group in site.topology.engines if group.process))
    specs = []
    for worker in range(proxy.workers):
        name = "proxy" if proxy.workers == 1 else f"proxy-{worker}"
        ports = {"http": proxy.port}
        if proxy.workers > 1 or proxy.tls_cert or _certificates(site.topology):
            # Any worker may answer on the shared socket, and it may use TLS for clients, which have no certificate: the
            # supervisor needs a port per worker.
            ports |= site.ports_of(name, ("control",))
        specs.append(_proxy(site.topology, site.host, site.run_dir, worker, ports, needed))
    return specs


def _proxy(
    topology: Topology, host: Host, run_dir: Path, worker: int, ports: dict[str, int], engines: tuple[str, ...]
) -> ProcessSpec:
    argv = [host.program or host.python, "-m", "pdctl.proxy", "--config", str(run_dir / "proxy.json")]
    base = f"http://{_in_url(topology.proxy.host)}:{topology.proxy.port}"
    if "control" in ports:
        argv += ["--worker", str(worker), "--control-port", str(ports["control"])]
        if host.address != LOOPBACK:
            argv += ["--control-host", host.address]
        base = f"{'https' if _certificates(topology) else 'http'}://{host.address}:{ports['control']}"
    # /health also depends on the engines, so liveness uses a path that answers whenever the proxy runs.
    alive = f"{base}/pdctl/v1/pool"
    # An engine that will register itself cannot be waited for: it needs a proxy that is ready. Engines of other nodes
    # may become ready much later.
    url = alive if topology.proxy.accept_nodes or topology.cluster else f"{base}/health"
    return ProcessSpec(
        name="proxy" if topology.proxy.workers == 1 else f"proxy-{worker}",
        kind=PROXY,
        role=PROXY,
        argv=tuple(argv),
        env=_identity(topology),
        device="cpu",
        cpus=topology.proxy.cpus or host.cpus,
        gpus=(),
        ports=ports,
        depends_on=engines,
        probe=Probe(url, alive, "", "", interval_s=0.05, timeout_s=2.0, startup_s=_PROXY_STARTUP_S),
        listen=(topology.proxy.host, topology.proxy.port),
        group="proxy",
        host=host.address,
        tls=bool(_certificates(topology)),
        slots=topology.proxy.slots,
        version=__version__,
        why=_kept(topology.proxy.slots),
    )


def _kept(slots: int) -> dict[str, str]:
    memory = slots * SLOT_BYTES / 2**20
    return {"slots": f"so many connections outlive it, with up to {memory:.0f} MiB of memory"} if slots else {}


def _scheme(topology: Topology) -> str:
    return "https" if topology.proxy.tls_cert else "http"


def _in_url(host: str) -> str:
    """A listener's address as part of a URL on this machine."""
    address = reachable(host)
    return f"[{address}]" if ":" in address else address
