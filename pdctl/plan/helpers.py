"""The processes of a plan that are neither engines nor proxies: stores and commands; and the order of all. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdctl.host import Host
from pdctl.plan.ports import PortSearch, free_ports
from pdctl.plan.spec import COMMAND, STORE, Probe, ProcessSpec
from pdctl.stores import StorePlace, store_launcher
from pdctl.topology.checks.processes import PLACEHOLDER
from pdctl.topology.spec import Command, Device, Store, Topology


@dataclass(slots=True)
class Site:
    """What placing one process needs. `kept`: running processes by name, which keep their ports; `ports`: those chosen
    so far, by process."""

    topology: Topology
    host: Host
    run_dir: Path
    kept: dict[str, ProcessSpec]
    ports: dict[str, dict[str, int]] = field(default_factory=dict)
    taken: set[int] = field(init=False)

    def __post_init__(self) -> None:
        given = [port for entry in self.topology.processes for _, port in entry.ports]
        kept = [port for spec in self.kept.values() for port in spec.ports.values()]
        self.taken = {self.topology.proxy.port, *self.host.listening, *self.host.claimed, *given, *kept}

    def ports_of(self, name: str, purposes: tuple[str, ...]) -> dict[str, int]:
        """A port for each purpose of a process: the one that it had, or a free one. Raises PdctlError."""
        before = self.kept[name].ports if name in self.kept else {}
        search = PortSearch(self.run_dir, self.topology.service.engine_ports)
        found = self.ports[name] = free_ports(purposes, before, self.taken, search)
        return dict(found)

    def members(self, names: Iterable[str]) -> tuple[str, ...]:
        """The processes of these groups, processes and stores."""
        return tuple(member for name in names for member in self.topology.members(name))


# -- commands ----------------------------------------------------------------------------------------------


def command_of(site: Site, entry: Command) -> ProcessSpec:
    """A program of the user's."""
    given = {purpose: port for purpose, port in entry.ports if port}
    chosen = site.ports_of(entry.name, tuple(purpose for purpose, port in entry.ports if not port))
    ports = {purpose: given.get(purpose) or chosen[purpose] for purpose, _ in entry.ports}
    gpus = tuple(gpu.uuid for name in entry.gpus if (gpu := site.host.gpu_named(name)) is not None)
    env = {name: _filled(value, ports) for name, value in entry.env}
    if gpus:
        env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(gpus), **env}
    address = f"{site.host.address}:{next(iter(ports.values()), 0)}"
    return ProcessSpec(
        name=entry.name,
        kind=COMMAND,
        role=COMMAND,
        argv=tuple(_filled(word, ports) for word in entry.command),
        env=env,
        device=(Device.CUDA if gpus else Device.CPU).value,
        cpus=entry.cpus or site.host.cpus,
        gpus=gpus,
        ports=ports,
        depends_on=site.members(entry.depends_on),
        probe=_probe(site.topology, _address(entry.ready, address), _address(entry.alive, address)),
        listen=None,
        group=entry.name,
        restart_with=site.members(entry.restart_with),
        host=site.host.address,
    )


def _filled(text: str, ports: dict[str, int]) -> str:
    """The text with its placeholders replaced by ports."""
    return PLACEHOLDER.sub(lambda found: str(ports[found[1] or next(iter(ports))]), text)


def _address(probe: str, address: str) -> str:
    """A probe of the topology with the address that it asks."""
    if probe == "tcp":
        return f"tcp:{address}"
    if probe.startswith("http:"):
        return f"http://{address}{probe.removeprefix('http:')}"
    return "" if probe == "none" else probe


def _probe(topology: Topology, ready: str, alive: str) -> Probe:
    startup_s = topology.supervision.startup_s
    return Probe(ready, alive, "", "", interval_s=0.1, timeout_s=5.0, startup_s=startup_s)


# -- stores ------------------------------------------------------------------------------------------------


def store_of(site: Site, store: Store) -> ProcessSpec:
    """A KV store. Its ports are chosen here, before those of its engines."""
    site.ports_of(store.name, store_launcher(store.kind).ports(store))
    place = place_of(site, store)
    launch = store_launcher(store.kind).launch(place)
    return ProcessSpec(
        name=store.name,
        kind=store.kind,
        role=STORE,
        argv=launch.argv,
        env={**launch.env, **dict(store.env)},
        device=Device.CPU.value,
        cpus=store.cpus or site.host.cpus,
        gpus=(),
        ports=dict(place.ports),
        depends_on=(),
        probe=_probe(site.topology, launch.ready, launch.alive),
        listen=None,
        group=store.name,
        host=place.host,
    )


def place_of(site: Site, store: Store) -> StorePlace:
    """Where a store runs."""
    return StorePlace(store, site.host.address, site.ports[store.name], store.python or site.host.python)


# -- order -------------------------------------------------------------------------------------------------


def in_order(specs: Sequence[ProcessSpec]) -> list[ProcessSpec]:
    """The processes, each behind those that it depends on, else in the given order. There are no cycles."""
    waiting, ordered = list(specs), list[ProcessSpec]()
    while waiting:
        placed = {spec.name for spec in ordered}
        spec = next(spec for spec in waiting if placed.issuperset(spec.depends_on))
        waiting.remove(spec)
        ordered.append(spec)
    return ordered
