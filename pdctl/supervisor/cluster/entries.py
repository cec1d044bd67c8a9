"""What nodes write into the registry, and under which keys."""

from __future__ import annotations

import msgspec

from pdctl.registry import Entry
from pdctl.topology.spec import ENGINE_ROLES
from pdctl.wire import Port

READY, DRAINING, GONE = "ready", "draining", "gone"


class EngineEntry(msgspec.Struct, frozen=True):
    """One engine of a node, or its proxy: that holds leases, too. `state`: ready, draining (no new requests), or gone:
    written before the key is deleted, so that a deleted key and one whose lease has ended are told apart."""

    node: str
    name: str
    kind: str
    role: str
    host: str
    port: Port
    epoch: str
    state: str = READY
    role_epoch: int = 0
    connector: str = ""
    ports: dict[str, Port] = {}
    inline: bool = False

    @property
    def is_engine(self) -> bool:
        """Whether it computes requests."""
        return self.role in ENGINE_ROLES

    @property
    def holder(self) -> str:
        """Its name in lease tables."""
        return f"{self.name}@{self.epoch}"


class NodeEntry(msgspec.Struct, frozen=True):
    """A node whose agent runs. `address`: where its engines listen; `boot`: the id of its boot; `agent_port`: where its
    agent answers other agents; `facts`: what a plan needs to know of it (host/facts.py); `cell`: Cluster.cell_of."""

    name: str
    address: str
    boot: str
    pdctl: str
    agent_port: int = 0
    facts: msgspec.Raw = msgspec.Raw(b"null")
    cell: str = ""


class TopologyEntry(msgspec.Struct, frozen=True):
    """The topology that is to run. `source`: the file that it came from."""

    text: str
    source: str


# Written instead of deleting the key: a late write of an earlier topology would find a deleted key as it expects it.
WITHDRAWN = TopologyEntry("", "")


class Order(msgspec.Struct, frozen=True):
    """What one node is to run: `engines` of the topology, and a proxy if the topology wants one there; nothing without
    a topology.

    `term`: of the coordinator that gave the order; an agent obeys none with a lower term than it has seen.
    """

    term: int
    node: str
    topology: TopologyEntry | None
    engines: tuple[str, ...]


class PlacementEntry(msgspec.Struct, frozen=True):
    """What the coordinator tells of the places of engines. `node`: where it runs; `problem`: why some have none, or why
    nothing is moved, "" if all is well; `hint`: what to do; `unplaced`: engines that run nowhere.

    `away`: nodes of which the registry tells nothing, and which keep their engines; `lost`: those that lose them."""

    term: int
    node: str
    problem: str = ""
    hint: str = ""
    unplaced: tuple[str, ...] = ()
    away: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


class Keys:
    """The keys of one service, for the nodes of one cell; "": it has no cells."""

    def __init__(self, service: str, cell: str = "") -> None:
        self.all = f"/pdctl/{service}/"
        self.nodes = f"{self.all}nodes/"
        self.engines = f"{self.all}engines/{cell}/" if cell else f"{self.all}engines/"
        self.desired = f"{self.all}desired/"
        self.quarantine = f"{self.all}quarantine/"
        self.topology = f"{self.all}topology"
        self.turn = f"{self.all}turn"
        self.coordinator = f"{self.all}coordinator"
        self.placement = f"{self.coordinator}/placement"

    def node(self, node: str) -> str:
        """The key of a node."""
        return f"{self.nodes}{node}"

    def order(self, node: str) -> str:
        """The key of what a node is to run."""
        return f"{self.desired}{node}"

    def engine(self, node: str, name: str) -> str:
        """The key of an engine."""
        return f"{self.engines}{node}/{name}"

    def engines_of(self, node: str) -> str:
        """The prefix of the engines of a node."""
        return f"{self.engines}{node}/"


def engine_of(entry: Entry) -> EngineEntry | None:
    """The engine that an entry tells of; None for something that this version does not understand."""
    try:
        return msgspec.json.decode(entry.value, type=EngineEntry)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
