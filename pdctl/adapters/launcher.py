"""The launcher of an engine kind: makes a command line from a group's settings. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from pdctl.kv_events import Endpoints
from pdctl.topology.spec import Device, EngineGroup, Role, Topology

# A completion of one token, which every engine with an OpenAI API answers.
ONE_TOKEN = '{"prompt":[1],"max_tokens":1,"temperature":0}'  # noqa: S105 - a request, not a secret

# Bytes of the path of a socket.
_LONGEST_SOCKET = 107

# The name of an installed package and its version.
Package = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The plan's decisions for one engine. `host`: the address it listens on; `ports` by purpose; `gpus`: UUIDs.

    `package`: the installed package that provides the engine, and its version; both "" if its kind names none.
    `otlp_endpoint`: the collector for its spans, "" if it exports none.
    """

    name: str
    group: EngineGroup
    host: str
    ports: dict[str, int] = field(hash=False)
    gpus: tuple[str, ...]
    rdma: tuple[str, ...]
    model_path: str
    run_dir: Path
    python: str
    cpus: tuple[int, ...] = ()
    package: Package = ("", "")
    otlp_endpoint: str = ""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one engine: its command, and the environment variables to add to the supervisor's.

    Paths of its HTTP server: `ready_path` answers 200 once the engine is usable and while it is alive;
    `generate_path` answers a POST of `generate_body` (JSON) with one token, "" if the kind has no such path.
    `ready_generates`: the engine is ready only after it has done that once. `api_key_env`: the variable from which the
    engine reads its API key, "" if the run's secret is not its API key. `kv_events`: where it publishes which blocks it
    has, in the form of vLLM; None if it does not.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    ready_path: str
    generate_path: str = ""
    generate_body: str = ONE_TOKEN
    ready_generates: bool = False
    api_key_env: str = ""
    kv_events: Endpoints | None = None


class KnownFailure(NamedTuple):
    """A failure that engines of a kind report in their log. `pattern`: a regular expression for one line.

    `message` and `hint`: for the user; `{0}` and so on stand for the pattern's groups. `incurable`: a restart would
    fail again.
    """

    pattern: str
    message: str
    hint: str
    incurable: bool = True


class Installed(NamedTuple):
    """A group of engines, and the package that its environment has; both its parts are "" if that is unknown."""

    group: EngineGroup
    package: Package


class Fault(NamedTuple):
    """A setting that cannot work. `key`: the key of [[engines]] that is wrong."""

    key: str
    message: str
    hint: str


class Launcher(Protocol):
    """The launcher of an engine kind.

    `device`: the default device. `settings`: the keys of [[engines]] that have an effect on engines of this kind, in
    addition to those of every kind; `service_settings`: keys of [service] that not every kind has. `packages`: Python
    modules that engines import from pdctl's own environment;
    `distributions`: packages of which one must be installed in the environment of the group's `python`. `connectors`:
    the values of `connector`, the default first. `phases`: (regular expression for a line of the log, phase of the
    start that begins with it). `tracing`: packages that its environment needs to export spans; empty if the kind
    exports none. `failures`: tried in order. `leaves_shared_memory`: a killed engine leaves named shared
    memory, which the supervisor removes. `replicates`: `data_parallel` makes so many engines of one, each with its own
    KV endpoint. `certified`: with `[cluster] certificates`, its engines speak TLS and want certificates.
    """

    device: Device
    settings: frozenset[str]
    service_settings: frozenset[str]
    packages: tuple[str, ...]
    distributions: tuple[str, ...]
    connectors: tuple[str, ...]
    phases: tuple[tuple[str, str], ...]
    tracing: tuple[str, ...]
    failures: tuple[KnownFailure, ...]
    leaves_shared_memory: bool
    replicates: bool
    certified: bool

    def requirement(self, device: Device) -> str:
        """The pip requirement that provides the engine, for a hint."""
        ...

    def ports(self, group: EngineGroup) -> tuple[str, ...]:
        """Purposes of the ports that an engine opens in addition to `http`.

        Purposes that differ only in a final number, such as side, side-1 and side-2, get consecutive ports.
        """
        ...

    def faults(self, topology: Topology, group: EngineGroup, package: Package) -> Iterable[Fault]:
        """Settings of a group that cannot work with this version, or with the rest of the topology."""
        ...

    def pair_faults(self, prefill: Installed, decode: Installed) -> Iterable[Fault]:
        """Settings of a decode group that do not fit those of a prefill group of the same kind."""
        ...

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """The command line of one engine. Pure."""
        ...


def different_installations(prefill: Installed, decode: Installed) -> Iterator[Fault]:
    """Faults of engines that exchange KV as raw memory: other versions lay it out differently, other types differ."""
    (ours, (_, version)), (other, (_, other_version)) = decode, prefill
    if version and other_version and version != other_version:
        message = f"{ours.name!r} has version {version}, but {other.name!r} has {other_version}"
        yield Fault("python", message, "engines that exchange KV need the same version")
    if ours.dtype != other.dtype:
        message = f"{ours.name!r} has dtype {ours.dtype!r}, but {other.name!r} has {other.dtype!r}"
        yield Fault("dtype", message, "engines that exchange KV need the same dtype")


def option_faults(group: EngineGroup, reserved: Collection[str]) -> Iterator[Fault]:
    """Faults of arguments that contradict the plan. Engines accept "_" for "-" in the names of options."""
    for argument in group.args:
        option = argument.partition("=")[0]
        if option.replace("_", "-") in reserved:
            yield Fault("args", f"{option} is set by pdctl", "remove it; the topology's keys and the plan decide it")


def events_endpoints(topology: Topology, assignment: Assignment, without: Collection[str]) -> Endpoints | None:
    """Where an engine is to publish its KV events for the proxies of its machine; None if they would not read them.

    `without`: arguments with which it publishes none, or elsewhere. They are sockets of the run directory, which only
    this user can open: events contain prompts, and at an address of one interface vLLM does not listen.
    """
    group = assignment.group
    given = {re.split(r"[=.]", argument)[0].replace("_", "-") for argument in group.args}
    # Several ranks behind one address: nobody can choose the one that has a prompt.
    if topology.proxy.routing != "prefix_aware" or group.role is Role.DECODE or group.data_parallel > 1:
        return None
    base = f"{assignment.run_dir}/ipc/{assignment.name}"
    found = Endpoints(f"ipc://{base}.events", f"ipc://{base}.replay")
    fits = len(base.encode()) + len(".events") <= _LONGEST_SOCKET
    return found if fits and given.isdisjoint(without) else None


# The packages that vLLM and SGLang need, together, whichever protocol is used.
OTLP_EXPORTERS = ("opentelemetry-exporter-otlp-proto-http", "opentelemetry-exporter-otlp-proto-grpc")


def version_numbers(version: str) -> tuple[int, ...]:
    """(0, 32, 0) for 0.32.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


class BaseLauncher:
    """Defaults for launchers: no extra settings, packages, ports or known failures, on the CPU."""

    device = Device.CPU
    settings: frozenset[str] = frozenset()
    service_settings: frozenset[str] = frozenset()
    packages: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()
    connectors: tuple[str, ...] = ()
    phases: tuple[tuple[str, str], ...] = ()
    tracing: tuple[str, ...] = ()
    failures: tuple[KnownFailure, ...] = ()
    leaves_shared_memory = False
    replicates = False
    certified = False

    def requirement(self, device: Device) -> str:
        """See Launcher.requirement."""
        return ""

    def ports(self, group: EngineGroup) -> tuple[str, ...]:
        """See Launcher.ports."""
        return ()

    def faults(self, topology: Topology, group: EngineGroup, package: Package) -> Iterable[Fault]:
        """See Launcher.faults."""
        return ()

    def pair_faults(self, prefill: Installed, decode: Installed) -> Iterable[Fault]:
        """See Launcher.pair_faults."""
        return ()
