"""The control API of one node's supervisor, which answers for the whole cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Never, Protocol, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from starlette.routing import Route

from pdctl.control_api import (
    ExitReport,
    Exits,
    KeysStatus,
    KvStatus,
    LogNames,
    LogPart,
    MeasuredStatus,
    NodeChanges,
    ProcessStatus,
    PublishedTopology,
    RoleOrder,
    ServiceStatus,
    TopologyOrder,
    TopologyReply,
    Verb,
)
from pdctl.errors import PdctlError
from pdctl.net.http_client import Unreachable
from pdctl.net.identity import ContextFactory
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.supervisor.cluster.entries import Order
from pdctl.supervisor.surface.cluster.agents import AgentAddress, AgentClient, Agents, Silent
from pdctl.supervisor.surface.cluster.events import ClusterStreams
from pdctl.supervisor.surface.cluster.merge import (
    ClusterFacts,
    answered,
    merged_keys,
    merged_kv,
    merged_status,
    owner_of,
)
from pdctl.supervisor.surface.controlled import LocalService, LogPlace, OneMachine
from pdctl.supervisor.surface.events import Streams
from pdctl.wire import LeaseReply

Answer = TypeVar("Answer")

# A node makes a plan to say what would change, and reads the machine's facts for it, seconds.
_PLAN_S = 10.0


class Publishing(Protocol):
    """The cluster's topology, in its registry. Every method may raise PdctlError with the reason and a hint."""

    async def topology(self) -> PublishedTopology:
        """What is published."""
        ...

    async def orders(self, text: str, source: str) -> tuple[Order, ...]:
        """What each node would be told to run, the coordinator's decision. One for every node."""
        ...

    async def publish(self, text: str, source: str, revision: int | None) -> int:
        """Publish, if `revision` is published now (None: whatever is, 0: nothing). Returns the new revision."""
        ...

    async def withdraw(self) -> None:
        """Publish that nothing is to run."""
        ...

    async def preview(self, order: Order) -> Changes:
        """What an order would change on this node."""
        ...


class ClusterControl:
    """`local`: this node's part; `own`: this node's agent; `others`: agents of other nodes that are registered, or
    were; `facts`: what the registry told last; `more`: further calls."""

    def __init__(
        self,
        local: LocalService,
        own: AgentAddress,
        others: Callable[[], Sequence[AgentAddress]],
        secret: str,
        facts: Callable[[], ClusterFacts],
        publishing: Publishing,
        tls: ContextFactory | None = None,
    ) -> None:
        self.local = local
        self.more: Sequence[Route] = ()
        self._here = OneMachine(local)
        self.agents = Agents(others, secret, tls)
        self._own = own
        self._others = others
        self._facts = facts
        self._publishing = publishing

    def streams(self) -> Streams:
        """The events of all nodes."""
        return ClusterStreams(self.local.journal, self._own.node, self.agents)

    def close(self) -> None:
        """Close the connections to other nodes."""
        self.agents.close()

    # -- what is shown -------------------------------------------------------------------------------------

    async def status(self) -> ServiceStatus:
        """The status of all nodes, without measurements."""
        answers = await self.agents.all(_status)
        return merged_status(self._own, self.local.status(), self._others(), answers, self._facts())

    async def fresh_status(self) -> MeasuredStatus:
        """The status of all nodes, with measurements."""
        local, answers = await self._both(
            self.local.fresh_status(), lambda agent: agent.get("/v1/status", MeasuredStatus)
        )
        return merged_status(self._own, local, self._others(), answers, self._facts())

    async def exits(self) -> tuple[ExitReport, ...]:
        """The last exits on all nodes, oldest first."""
        answers = answered(await self.agents.all(lambda agent: agent.get("/v1/exits", Exits)))
        found = {self._own.node: self.local.exits(), **{node: exits.exits for node, exits in answers.items()}}
        told = [msgspec.structs.replace(one, node=node) for node, exits in found.items() for one in exits]
        return tuple(sorted(told, key=lambda report: report.at))

    async def keys(self) -> KeysStatus:
        """The API keys, counted over all nodes."""
        own, others = await self._both(self.local.keys(), lambda agent: agent.get("/v1/keys", KeysStatus))
        return merged_keys({self._own.node: own, **others})

    async def leases(self) -> KvStatus:
        """Blocks and leases of all nodes."""
        own, others = await self._both(self.local.leases(), lambda agent: agent.get("/v1/kv", KvStatus))
        return merged_kv({self._own.node: own, **others})

    async def log_names(self) -> LogNames:
        """The processes that have logs on each node."""
        own = await self._here.log_names()
        answers = await self.agents.all(lambda agent: agent.get("/v1/logs", LogNames), patient=True)
        found = {self._own.node: own.names, **{node: told.names for node, told in answered(answers).items()}}
        return LogNames(
            names={node: names[""] for node, names in sorted(found.items()) if "" in names},
            silent={node: answer.reason for node, answer in answers.items() if isinstance(answer, Silent)},
        )

    async def log_part(self, name: str, place: LogPlace) -> LogPart:
        """A piece of the log NODE/NAME. Raises LookupError."""
        node, _, bare = name.partition("/")
        if (client := self.agents.clients().get(node)) is None:
            return await self._here.log_part(bare if node == self._own.node else name, place)
        query = urlencode({"after": place.place, "previous": int(place.previous), "last": place.last})
        try:
            return await client.get(f"/v1/logs/{quote(bare, safe='')}?{query}", LogPart)
        except Unreachable as failure:
            raise PdctlError(f"node {node} does not answer: {failure}") from None

    # -- what is done --------------------------------------------------------------------------------------

    async def revoke(self, lease_id: str) -> LeaseReply:
        """Revoke a lease, at the node whose engine granted it."""
        reply = await self.local.revoke(lease_id)
        if reply.ok:
            return reply
        # A lease's id begins with the epoch of the engine that granted it: only that one takes the call for its own.
        answers = await self.agents.all(lambda agent: agent.revoke(lease_id), patient=True)
        if any(answer.ok for answer in answered(answers).values()):
            return LeaseReply(True)
        silent = [f"node {node}: {answer.reason}" for node, answer in answers.items() if isinstance(answer, Silent)]
        return LeaseReply(False, "; ".join([reply.reason, *silent]))

    async def ask(self, name: str, verb: Verb, drain: bool) -> str:
        """Execute a verb on one process, wherever it runs."""
        return await self._routed(
            name, lambda bare: self.local.ask(bare, verb, drain), lambda agent, bare: agent.act(bare, verb, drain)
        )

    async def change_role(self, name: str, call: RoleOrder) -> str:
        """Give an engine another role, wherever it runs."""
        return await self._routed(
            name,
            lambda bare: self.local.change_role(bare, call),
            lambda agent, bare: agent.change_role(bare, call),
        )

    async def changes(self, wanted: Plan) -> Changes:
        """Refused: a plan is for one machine."""
        self._refuse_plan()

    async def apply(self, wanted: Plan) -> str:
        """Refused: a plan is for one machine."""
        self._refuse_plan()

    async def topology(self) -> PublishedTopology:
        """What is published."""
        return await self._publishing.topology()

    async def publish(self, order: TopologyOrder) -> TopologyReply:
        """Say what a topology would change on each node, and publish it unless that is all that is wanted."""
        orders = await self._publishing.orders(order.text, order.source)
        changes = await self._previews(orders)
        revision = 0
        if not order.dry_run:
            revision = await self._publishing.publish(order.text, order.source, order.revision)
        return TopologyReply(ok=True, revision=revision, nodes=changes)

    async def withdraw(self) -> str:
        """Let no node run anything."""
        await self._publishing.withdraw()
        return ""

    # -- parts ---------------------------------------------------------------------------------------------

    async def _both(
        self, own: Awaitable[Answer], call: Callable[[AgentClient], Awaitable[Answer]]
    ) -> tuple[Answer, dict[str, Answer | Silent]]:
        """The answer of this node and those of the others."""
        return await asyncio.gather(own, self.agents.all(call))

    async def _routed(
        self,
        name: str,
        here: Callable[[str], str],
        there: Callable[[AgentClient, str], Awaitable[str]],
    ) -> str:
        """Do it at the node that has the process. Returns why it is refused, or ""."""
        try:
            node, bare = await self._owner(name)
        except LookupError as failure:
            return str(failure.args[0])
        client = self.agents.clients().get(node)
        if client is None:
            return here(bare)
        try:
            return await there(client, bare)
        except Unreachable as failure:
            return f"node {node} does not answer: {failure}"

    async def _owner(self, name: str) -> tuple[str, str]:
        """The node and the name there. Raises LookupError with a reason."""
        node, slash, bare = name.partition("/")
        if slash and (node == self._own.node or node in self.agents.clients()):
            return node, bare
        found: dict[str, Sequence[ProcessStatus]] = {self._own.node: self.local.status().processes}
        if any(process.name == name and process.is_engine for process in found[self._own.node]):
            return self._own.node, name
        answers = await self.agents.all(_status, patient=True)
        found |= {other: status.processes for other, status in answered(answers).items()}
        return owner_of(name, found, [other for other, answer in answers.items() if isinstance(answer, Silent)])

    async def _previews(self, orders: Sequence[Order]) -> tuple[NodeChanges, ...]:
        by_node = {order.node: order for order in orders}

        async def ask(agent: AgentClient) -> NodeChanges | None:
            order = by_node.get(agent.agent.node)
            if order is None:
                return None
            return await agent.post("/v1/cluster/changes", order, NodeChanges, _PLAN_S)

        answers = await self.agents.all(ask, patient=True, within_s=_PLAN_S)
        found: dict[str, NodeChanges | Silent | None] = {**answers}
        if (mine := by_node.get(self._own.node)) is not None:
            try:
                found[self._own.node] = await changes_of(self._publishing, mine)
            except PdctlError as failure:
                found[self._own.node] = Silent(f"node {self._own.node}: {failure}", refused=True)
        return tuple(
            NodeChanges(node=node, unknown=told.reason, refused=told.refused) if isinstance(told, Silent) else told
            for node, told in sorted(found.items())
            if told is not None
        )

    def _refuse_plan(self) -> Never:
        raise PdctlError(
            f"service {self.local.plan.service!r} runs in a cluster, where a topology is published instead",
            "use pdctl apply of the same version as the agent",
        )


async def changes_of(publishing: Publishing, order: Order) -> NodeChanges:
    """What an order would change on this node. Raises PdctlError."""
    changes = await publishing.preview(order)
    return NodeChanges(
        node=order.node,
        added=changes.added,
        removed=changes.removed,
        restarted=changes.restarted,
        live=changes.live,
        unchanged=changes.unchanged,
    )


async def _status(agent: AgentClient) -> ServiceStatus:
    return await agent.get("/v1/status?measurements=0", ServiceStatus)
