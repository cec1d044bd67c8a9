"""What a launcher of agents does, and the messages between it and the command that asks for them."""

from __future__ import annotations

from typing import Protocol

import msgspec

from pdctl.plan.placement import Wish

STARTING, RUNNING, WAITING = "starting", "running", "waiting"


class Wanted(msgspec.Struct, frozen=True):
    """The agents of a service. `file`: the text of the topology file that they get; `engines`: what wants a place on
    their nodes; `cpus`: of engines, by name; `spare`: so many nodes may fail, and the others have room; `proxies`:
    nodes that have a proxy, and an agent for it, whatever else runs there."""

    service: str
    file: str
    engines: tuple[Wish, ...]
    cpus: dict[str, int]
    spare: int = 0
    proxies: tuple[str, ...] = ()
    allow_commands: bool = False


class Standing(msgspec.Struct, frozen=True):
    """How the agent of one node is. `state`: starting, running, or waiting to be started again; `is_adopted`: it ran
    already when its watcher came; `reason`: why it is not running; `pdctl`: the version that the node has; `notes`:
    what an operator should know."""

    node: str
    state: str = STARTING
    pid: int = 0
    is_adopted: bool = False
    reason: str = ""
    pdctl: str = ""
    notes: tuple[str, ...] = ()


class Started(msgspec.Struct, frozen=True):
    """What a start has led to. `is_new`: nothing was reserved before."""

    is_new: bool
    notes: tuple[str, ...] = ()


class Request(msgspec.Struct, frozen=True):
    """What to do. `verb`: start (with `wanted`) or give_back (with `service`); `address`: of the kind's own cluster."""

    verb: str
    kind: str
    address: str
    wanted: Wanted | None = None
    service: str = ""
    now: bool = False


class Told(msgspec.Struct, frozen=True):
    """How it went. `error`: why not, "" if it did; `ended`: the nodes where an agent was ended."""

    agents: list[Standing] = []
    notes: list[str] = []
    ended: list[str] = []
    error: str = ""
    hint: str = ""


class Launcher(Protocol):
    """Gets agents onto nodes. A launcher is used from a process of its own, which can be ended when it hangs."""

    def start(self, wanted: Wanted) -> Started:
        """Reserve what the agents need, and have each started, or adopted if it runs already. From then on each is
        watched, and started again when it ends. May be called again. Raises PdctlError."""

    def agents(self, service: str) -> list[Standing]:
        """How the agents are, as their watchers say now. Raises PdctlError."""

    def give_back(self, service: str, now: bool) -> list[str]:
        """End the watchers, the agents and all that runs below them, and the reservation, also what only a part of is
        left. `now`: without draining. Returns the nodes where something was ended. Raises PdctlError."""
