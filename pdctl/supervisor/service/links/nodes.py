"""The engines that registered themselves at the proxy: members of the service until somebody removes them, or until
they have not answered for some time.

Such an engine registers once, when it starts, and never again by itself. So a short absence does not end its
membership, and members outlive proxies, and the supervisor where engines do.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache

import msgspec

from pdctl.adapters import can_launch, kinds, launcher
from pdctl.control_api import Node, Nodes, NodeStatus
from pdctl.plan import Attached, Plan
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.service.links.attached import is_watched
from pdctl.supervisor.service.proxies import Proxies
from pdctl.supervisor.unit.verbs import State, drained

NODES = "nodes.json"
# How many engines may be registered at a time.
MOST = 256
_LOOK_S = 0.5


@dataclass(slots=True, eq=False)
class _Member:
    """One engine. `away_s`: how long it has not answered; `leaving`: it gets no new requests; `drains`: a task waits
    for the end of those that run."""

    node: Node
    answers: bool = False
    away_s: float = 0.0
    leaving: bool = False
    drains: bool = False


@dataclass(slots=True)
class RegisteredEngines:
    """`answering` returns the names of those that answer now, `tell` updates the proxies, `tidy` is called when an
    engine may be gone."""

    plan: Callable[[], Plan]
    proxies: Proxies
    state_of: State
    answering: Callable[[], set[str]]
    tell: Callable[[], Awaitable[None]]
    tidy: Callable[[], None]
    journal: Journal
    run_dir: RunDir
    _members: dict[str, _Member] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def load(self) -> None:
        """Take over the members of an earlier supervisor."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found = msgspec.json.decode((self.run_dir.path / NODES).read_bytes(), type=list[Node])
            self._members = {node.name: _Member(node) for node in found[:MOST]}

    def attached(self) -> tuple[Attached, ...]:
        """The members as engines of the service, without those that the topology has by now."""
        plan = self.plan()
        nodes = (member.node for member in self._members.values())
        return tuple(_attached(plan, node) for node in nodes if not _owner(plan, node))

    def is_leaving(self, name: str) -> bool:
        """Whether an engine gets no new requests, because it was removed."""
        return name in self.proxies.leaving

    async def nodes(self) -> Nodes:
        """The members with their load, without those that are leaving."""
        loads = await self.proxies.loads()
        return Nodes(
            nodes=tuple(
                NodeStatus(
                    **msgspec.structs.asdict(member.node),
                    unfinished=sum(load.calls for load in loads.get(name, ())),
                    latency=tuple(seconds for load in loads.get(name, ()) for seconds in load.latency)[-15:],
                )
                for name, member in self._members.items()
                if not member.leaving
            )
        )

    # -- changes -------------------------------------------------------------------------------------------

    def add(self, node: Node) -> str:
        """Make an engine a member, or renew its membership. Returns the reason if it is refused, else ""."""
        if reason := self._objection(node):
            return reason
        member = self._members.get(node.name)
        if member is None or member.node != node:
            what = "registered itself" if member is None else "registered itself again"
            detail = {"kind": node.kind, "role": node.role, "models": list(node.models)}
            self.journal.say(node.name, f"{what}, as {node.role}", "node_added", **detail)
            self._members[node.name] = member = _Member(node)
        member.away_s, member.leaving = 0.0, False
        self.proxies.leaving.discard(node.name)
        self._save()
        return ""

    def remove(self, name: str) -> str:
        """Let a member finish its requests, then forget it. Returns the reason if it is none, else ""."""
        member = self._members.get(name)
        if member is None or member.leaving:
            return f"no engine at {name} has registered itself"
        self.journal.say(name, "is removed: it gets no new requests", "node_leaving")
        member.leaving = True
        self.proxies.leaving.add(name)
        self._save()
        return ""

    async def keep_forever(self) -> None:
        """Tell the proxies what has changed, end what is leaving, and forget what is gone, until cancelled."""
        looked = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._changed.wait()
                if self._changed.is_set():
                    self._changed.clear()
                    await self.tell()
                    self.tidy()
                for member in self._members.values():
                    if member.leaving and not member.drains:
                        member.drains = True
                        tasks.create_task(self._drain(member))
                self._review()
                now = time.monotonic()
                # A supervisor that was frozen has not seen whether they answered meanwhile.
                self._look(min(now - looked, 2 * _LOOK_S))
                looked = now

    # -- parts ---------------------------------------------------------------------------------------------

    def _objection(self, node: Node) -> str:
        plan = self.plan()
        if not plan.proxy.accept_nodes:
            return "this service accepts no engines that register themselves: set accept_nodes under [proxy]"
        if node.kind not in kinds() or not is_watched(node.kind):
            return f"engines of kind {node.kind!r} do not register themselves"
        if plan.served_model_name not in node.models:
            return (
                f"{node.url} serves {', '.join(node.models) or 'no model'}, and this service {plan.served_model_name}: "
                f"start the engine with this model, or with --model-name {plan.served_model_name} if it has it"
            )
        if owner := _owner(plan, node):
            return f"{node.url} is {owner!r} of the topology already"
        if node.name not in self._members and len(self._members) >= MOST:
            return f"{MOST} engines have registered themselves, and no more may"
        return ""

    async def _drain(self, member: _Member) -> None:
        name, drain_s = member.node.name, self.plan().supervision.drain_s
        if not await drained(name, drain_s, self.proxies.calls_at, self.state_of) and member.leaving:
            self.journal.say(name, f"still busy after {drain_s:g} s: its requests continue elsewhere", "drain_over")
        member.drains = False
        # It may have registered itself again meanwhile.
        if member.leaving and self._members.get(name) is member:
            self._forget(name, "was removed", "node_removed")

    def _review(self) -> None:
        """End the membership of those that a changed topology does not want."""
        plan = self.plan()
        for name, member in list(self._members.items()):
            if owner := _owner(plan, member.node):
                self._forget(name, f"is {owner!r} of the topology now", "node_removed")
            elif not member.leaving and not (plan.proxy.accept_nodes and plan.served_model_name in member.node.models):
                self.remove(name)

    def _look(self, elapsed_s: float) -> None:
        answering, limit_s = self.answering(), self.plan().proxy.node_away_s
        for name, member in list(self._members.items()):
            answers = name in answering
            if answers and not member.answers:
                self.journal.say(name, "answers", "node_answers")
            elif member.answers and not answers:
                self.journal.say(name, f"does not answer; it is forgotten in {limit_s:g} s", "node_silent")
            member.answers = answers
            member.away_s = 0.0 if answers else member.away_s + elapsed_s
            if member.away_s > limit_s:
                self._forget(name, f"has not answered for {limit_s:g} s and is forgotten", "node_lost")

    def _forget(self, name: str, message: str, event: str) -> None:
        del self._members[name]
        self.proxies.leaving.discard(name)
        self.journal.say(name, message, event)
        self._save()

    def _save(self) -> None:
        """Keep the members for a later supervisor, and wake the loop that tells the proxies."""
        staying = [member.node for member in self._members.values() if not member.leaving]
        with contextlib.suppress(OSError):
            self.run_dir.write_json(NODES, msgspec.to_builtins(staying))
        self._changed.set()


def _owner(plan: Plan, node: Node) -> str:
    """The process or engine of the topology that has this address; "" if there is none."""
    address = (node.host, node.port)
    for process in plan.processes:
        if address in {(process.host, port) for port in process.ports.values()}:
            return process.name
    return next((one.name for one in plan.attached if (one.host, one.port) == address), "")


def _attached(plan: Plan, node: Node) -> Attached:
    """Engines do not say how they exchange KV: as others of the same kind do."""
    same = [spec.connector for spec in plan.processes if spec.kind == node.kind]
    same += [one.connector for one in plan.attached if one.kind == node.kind]
    connector = same[0] if same else _connector(node.kind)
    return Attached(node.name, node.role, node.kind, node.host, node.port, "", {}, connector)


@cache
def _connector(kind: str) -> str:
    """How engines of a kind exchange KV by default."""
    return next(iter(launcher(kind).connectors), "") if can_launch(kind) else ""
