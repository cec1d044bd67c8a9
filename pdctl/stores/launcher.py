"""The launcher of a store kind: makes the store's command line, and what an engine needs to use it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from pdctl.topology.spec import Store, Transfer


@dataclass(frozen=True, slots=True)
class StorePlace:
    """The plan's decisions for one store. `host`: the address at which it listens; `ports` by purpose."""

    store: Store
    host: str
    ports: dict[str, int] = field(hash=False)
    python: str


class StoreLaunch(NamedTuple):
    """How to start a store. `ready`, `alive`: probes, as in Probe."""

    argv: tuple[str, ...]
    env: dict[str, str]
    ready: str
    alive: str


class Reader(NamedTuple):
    """An engine that uses a store. `host`: the address at which the store and other engines reach it."""

    name: str
    host: str
    rdma: tuple[str, ...]
    transfer: Transfer
    run_dir: Path


class StoreClient(NamedTuple):
    """What an engine needs to use a store: environment variables, and files by path."""

    env: dict[str, str]
    files: dict[str, str]


class StoreLauncher(Protocol):
    """The launcher of a store kind.

    `settings`: the keys of [[stores]] that have an effect on this kind, in addition to those of every kind;
    `distributions`: packages of which one must be installed in the environment of the store's `python`; `requirement`:
    what to install.
    """

    settings: frozenset[str]
    distributions: tuple[str, ...]
    requirement: str

    def ports(self, store: Store) -> tuple[str, ...]:
        """The purposes of the ports that the store opens."""
        ...

    def launch(self, place: StorePlace) -> StoreLaunch:
        """The command line of the store."""
        ...

    def client(self, place: StorePlace, reader: Reader) -> StoreClient:
        """What an engine needs to use the store."""
        ...


def config_path(reader: Reader, name: str) -> str:
    """The path of an engine's configuration file. Each engine has its own."""
    return str(reader.run_dir / "files" / f"{reader.name}.{name}")
