"""Requests that proxies of other nodes have at this node's engines: a drain waits for them, too.

They are asked directly, agent to agent: a kind that reports no state would otherwise be stopped under their streams.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdctl.supervisor.surface.api import encoded
from pdctl.supervisor.surface.cluster.agents import AgentClient, Agents, Silent

_PATH = "/v1/cluster/calls"


class EngineCalls(msgspec.Struct, frozen=True):
    """Calls that the proxies of one node have at an engine now."""

    calls: int


def calls_route(calls_at: Callable[[str], Awaitable[int]]) -> Route:
    """Where an agent tells other agents of its own proxies."""

    async def told(request: Request) -> Response:
        return encoded(EngineCalls(await calls_at(request.query_params.get("engine", ""))))

    return Route(_PATH, told)


async def calls_elsewhere(agents: Agents, engine: str) -> int:
    """Calls at this node's engine by the proxies of others. A registered node that does not answer may have one; of
    one that is not registered any more, nothing is known and nothing is waited for."""

    async def ask(agent: AgentClient) -> EngineCalls:
        return await agent.get(f"{_PATH}?{urlencode({'engine': engine})}", EngineCalls)

    answers = await agents.all(ask, patient=True)
    clients = agents.clients()
    silent = [
        node
        for node, answer in answers.items()
        if isinstance(answer, Silent) and node in clients and clients[node].agent.registered
    ]
    return len(silent) + sum(answer.calls for answer in answers.values() if not isinstance(answer, Silent))
