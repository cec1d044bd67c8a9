"""The launcher of an engine kind: makes a command line from a group's settings. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pdctl.topology.spec import Device, EngineGroup, Topology


@dataclass(frozen=True, slots=True)
class Assignment:
    """The plan's decisions for one engine. `host`: the address it listens on; `ports` by purpose; `gpus`: UUIDs."""

    name: str
    group: EngineGroup
    host: str
    ports: dict[str, int] = field(hash=False)
    gpus: tuple[str, ...]
    rdma: tuple[str, ...]
    model_path: str
    run_dir: Path
    python: str


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one engine: its command, and the environment variables to add to the supervisor's.

    Paths of its HTTP server: `ready_path` answers 200 once the engine is usable and while it is alive;
    `generate_path` accepts a completion request, "" if the kind has no such path.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    ready_path: str
    generate_path: str = ""


class Launcher(Protocol):
    """The launcher of an engine kind.

    `extra_ports`: purposes of the ports that an engine opens in addition to `http`, such as a bootstrap server's.
    `packages`: Python modules that engines import from pdctl's own environment; `pdctl plan` checks them.
    """

    extra_ports: tuple[str, ...]
    packages: tuple[str, ...]

    def requirement(self, device: Device) -> str:
        """The pip requirement that provides `packages`, for a hint."""
        ...

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """The command line of one engine. Pure."""
        ...
