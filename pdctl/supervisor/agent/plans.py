"""Makes this node's plan of an order: from the topology's text, the names of engines, and this machine's facts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from pdctl.errors import ConfigError, PdctlError
from pdctl.host import Host, read_host
from pdctl.host.processes.subprocesses import last_line, started
from pdctl.plan import Plan, Share, make_plan
from pdctl.plan.cluster import wishes_of
from pdctl.plan.models import preparation, with_model_at
from pdctl.supervisor.cluster.entries import Order, TopologyEntry
from pdctl.topology.loader import check_part, load_cluster_text, parse_text
from pdctl.topology.spec import Cluster, Topology

# A model may have to be downloaded.
_PREPARE_S = 3600.0


def this_node(address: str) -> Host:
    """The facts of this machine, as a node with this address."""
    return replace(read_host(), address=address)


class Planner:
    """`cluster`: as this node's own file has it; `empty`: the plan without processes, for a node that runs nothing;
    `allow_commands`: whether a topology from the registry may name programs, interpreters and options."""

    def __init__(
        self,
        node: str,
        address: str,
        cluster: Cluster,
        empty: Plan,
        allow_commands: bool,
        say: Callable[[str, str], None],
    ) -> None:
        self._node = node
        self._cluster = cluster
        self._address = address
        self._empty = empty
        self._allow_commands = allow_commands
        self._say = say

    async def plan_of(self, order: Order, running: Plan) -> Plan:
        """The plan of an order; processes that run keep their places. Raises PdctlError."""
        planned = await self.unprepared(order, running)
        argv = preparation(planned)
        if argv is None or not any(spec.is_engine for spec in planned.processes):
            return planned
        self._say("pdctl", f"preparing {planned.model}")
        return with_model_at(planned, await _prepared(argv, planned.model))

    async def unprepared(self, order: Order, running: Plan) -> Plan:
        """The same, but the model may not be here yet. Raises PdctlError."""
        if order.topology is None:
            return self._empty
        return await asyncio.to_thread(self._plan, order.topology, order.engines, running)

    def _plan(self, entry: TopologyEntry, engines: tuple[str, ...], running: Plan) -> Plan:
        try:
            return self._checked_plan(entry, engines, running)
        except ConfigError as failure:
            problem = failure.problems[0]
            message = f"the topology is wrong here: line {problem.line}: {problem.message}"
            raise PdctlError(message, problem.hint) from failure

    def _checked_plan(self, entry: TopologyEntry, engines: tuple[str, ...], running: Plan) -> Plan:
        topology = load_cluster_text(entry.text, entry.source)
        if topology.service.name != self._empty.service:
            raise PdctlError(f"the topology is for service {topology.service.name!r}, not {self._empty.service!r}")
        if not self._allow_commands and (named := commands_in(topology)):
            hint = "start the agent with --allow-commands if everyone who may write to etcd may run commands here"
            raise PdctlError(f"the topology sets {named}: this agent runs only what pdctl starts itself", hint)
        # Where this node's certificates and its secret are, and whether it has any, is for its own file to say.
        topology = replace(topology, cluster=self._cluster)
        share, host = Share(self._node, frozenset(engines)), this_node(self._address)
        check_part(topology, share.of(topology, host.address), host)
        return make_plan(topology, host, running, share)


@lru_cache(maxsize=4)
def engines_of(entry: TopologyEntry | None) -> tuple[str, ...]:
    """The engines that a topology wants; none of one that this version does not understand."""
    if entry is None:
        return ()
    try:
        return tuple(wish.name for wish in wishes_of(parse_text(entry.text, entry.source)))
    except ConfigError:
        return ()


def commands_in(topology: Topology) -> str:
    """The first key of a topology that names a program or its options; "" if there is none."""
    if topology.processes:
        return "[[processes]]"
    if topology.stores:
        return "[[stores]]"
    for group in topology.engines:
        for key in ("python", "args", "env"):
            if getattr(group, key):
                return f"{key} of group {group.name}"
    return ""


async def _prepared(argv: list[str], model: str) -> str:
    """Run the command that prepares a model, and return the path that it prints. Raises PdctlError."""
    async with started(argv) as process:
        try:
            async with asyncio.timeout(_PREPARE_S):
                out, said = await process.communicate()
        except TimeoutError:
            raise PdctlError(f"preparing {model} took more than {_PREPARE_S:g} s") from None
    path = out.decode(errors="replace").strip().rpartition("\n")[2]
    if process.returncode != 0 or not path:
        raise PdctlError(f"model {model} cannot be used: {last_line(said, process.returncode)}")
    return path
