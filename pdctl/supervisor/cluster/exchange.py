"""Limits of API keys over the proxies of all nodes: agents ask each other what was taken, not the registry."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Never

from pdctl.net.http_client import Unreachable
from pdctl.proxy_wire import SpentNews, SpentReply
from pdctl.supervisor.cluster.spending import NodeSpent, Spending

# Proxies and other agents are asked this often: what is spent anywhere is known everywhere after two of these at most.
_PERIOD_S = 0.5
# An agent that has not answered after this does not answer.
_ANSWER_S = 2.0
_AT_ONCE = 32


class SharedLimits:
    """`others` returns the names of the other nodes whose agents can be asked; `fetch` asks one, and may raise
    Unreachable; `tell` gives the news to this node's proxies, and returns what each answers, by name; `wanted`: whether
    any API key has a limit."""

    def __init__(
        self,
        node: str,
        others: Callable[[], Iterable[str]],
        fetch: Callable[[str], Awaitable[NodeSpent]],
        tell: Callable[[SpentNews], Awaitable[dict[str, SpentReply]]],
        wanted: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spending = Spending(node)
        self._others = others
        self._fetch = fetch
        self._tell = tell
        self._wanted = wanted
        self._clock = clock
        self._asking: set[str] = set()
        self._limit = asyncio.Semaphore(_AT_ONCE)

    def report(self) -> NodeSpent:
        """What this node's agent answers other agents."""
        return self._spending.report(self._clock())

    async def run_forever(self) -> Never:
        """Exchange until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                if self._wanted():
                    nodes = set(self._others())
                    self._spending.keep_only(nodes, self._clock())
                    # A node that does not answer keeps nobody else waiting.
                    for node in nodes - self._asking:
                        self._asking.add(node)
                        tasks.create_task(self._ask(node))
                    for proxy, reply in (await self._tell(self._spending.news(self._clock()))).items():
                        self._spending.replied(proxy, reply, self._clock())
                await asyncio.sleep(_PERIOD_S * random.uniform(0.9, 1.0))  # noqa: S311 - jitter, no secret
        raise AssertionError("the loop has no end")

    async def _ask(self, node: str) -> None:
        try:
            with contextlib.suppress(Unreachable, TimeoutError):
                async with self._limit, asyncio.timeout(_ANSWER_S):
                    self._spending.heard(node, await self._fetch(node), self._clock())
        finally:
            self._asking.discard(node)
