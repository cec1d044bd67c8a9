"""What the proxies of all nodes share through their agents: bodies in quarantine, and the limits of API keys."""

from __future__ import annotations

from collections.abc import Callable

from pdctl.errors import PdctlError
from pdctl.net.http_client import Unreachable
from pdctl.registry import Registry
from pdctl.supervisor.cluster.entries import Keys
from pdctl.supervisor.cluster.exchange import SharedLimits
from pdctl.supervisor.cluster.quarantine import SharedQuarantine
from pdctl.supervisor.cluster.spending import NodeSpent
from pdctl.supervisor.service.running import RunningService
from pdctl.supervisor.surface.cluster.agents import Agents

# Where an agent tells what its proxies took from the limits of API keys.
SPENT_PATH = "/v1/cluster/spent"


class Sharing:
    """Of the proxies of `running`, with those of `agents`. The limits need no registry: each part runs by itself."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        node: str,
        running: RunningService,
        agents: Agents,
        heard: Callable[[str | None], None],
    ) -> None:
        self._running = running
        self._agents = agents
        self.limits = SharedLimits(node, self._nodes, self._fetch, running.proxies.spent, self._has_limits)
        self.quarantine = SharedQuarantine(registry, keys, node, running.proxies.quarantined, heard)

    def _nodes(self) -> list[str]:
        return list(self._agents.clients())

    async def _fetch(self, node: str) -> NodeSpent:
        client = self._agents.clients().get(node)
        if client is None:
            raise Unreachable(f"node {node} is not known any more")
        try:
            return await client.get(SPENT_PATH, NodeSpent)
        except PdctlError as failure:
            raise Unreachable(failure.message) from failure

    def _has_limits(self) -> bool:
        keys = self._running.plan.proxy.keys
        return any(key.requests_per_minute or key.tokens_per_minute or key.streams for key in keys)
