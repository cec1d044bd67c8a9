"""The agents of other nodes, as this node calls them: over TCP, each with a deadline, all of them at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote, urlencode

import msgspec

from pdctl.control_api import Reply, RoleOrder, Verb
from pdctl.errors import PdctlError
from pdctl.net.http_client import ConnectionPool, Exchange, Unreachable, header_lines
from pdctl.net.identity import ContextFactory

Answer = TypeVar("Answer")

# One call to an agent, seconds: it asks its own engines meanwhile, which have a second.
CALL_S = 2.0
_CONNECT_S = 1.0
# All calls to all agents, seconds: with many that are silent, the last must not wait for every other.
_ALL_S = 4.0
# A node that did not answer is not asked for a status again for so long, seconds: others must not wait for it.
_QUIET_S = 3.0
_AT_ONCE = 256
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class AgentAddress:
    """Where a node's agent answers. `registered`: its registration is valid now; `version`: of its pdctl."""

    node: str
    host: str
    port: int
    registered: bool = True
    version: str = ""

    @property
    def text(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Silent:
    """A node that did not answer, and why; `refused`: it did, and refused the call."""

    reason: str
    refused: bool = False


class AgentClient:
    """Calls one agent. Every method raises Unreachable; calls that it refuses raise PdctlError."""

    def __init__(self, agent: AgentAddress, secret: str, tls: ContextFactory | None = None) -> None:
        self.agent = agent
        self._pool = ConnectionPool(agent.host, agent.port, _CONNECT_S, tls)
        self._headers = header_lines({"authorization": f"Bearer {secret}", "content-type": "application/json"})

    async def get(self, path: str, kind: type[Answer], within_s: float = CALL_S) -> Answer:
        """GET a message."""
        return await self._call("GET", path, kind, b"", within_s)

    async def post(
        self, path: str, message: msgspec.Struct | None, kind: type[Answer], within_s: float = CALL_S
    ) -> Answer:
        """POST a message, or nothing."""
        body = b"" if message is None else msgspec.json.encode(message)
        return await self._call("POST", path, kind, body, within_s)

    async def act(self, name: str, verb: Verb, drain: bool) -> str:
        """Execute a verb on a process of its node. Returns why it is refused, or ""."""
        path = f"/v1/processes/{quote(name, safe='')}/{verb}" + ("?drain=1" if drain else "")
        return (await self.post(path, None, Reply)).reason

    async def change_role(self, name: str, order: RoleOrder) -> str:
        """Give an engine of its node another role. Returns why it is refused, or ""."""
        return (await self.post(f"/v1/processes/{quote(name, safe='')}/role", order, Reply)).reason

    async def revoke(self, lease_id: str) -> Reply:
        """Revoke a lease that an engine of its node granted."""
        return await self.post(f"/v1/kv/revoke?{urlencode({'lease': lease_id})}", None, Reply)

    async def stream(self, path: str) -> Exchange:
        """Begin to read an answer without an end; always close it. Raises PdctlError if it is refused."""
        exchange = self._pool.exchange("GET", path, self._headers)
        try:
            async with asyncio.timeout(CALL_S):
                status = await exchange.head()
            if status != 200:
                async with asyncio.timeout(CALL_S):
                    self._check(status, await _bounded(exchange))
        except TimeoutError:
            exchange.close()
            raise self._late(CALL_S) from None
        except BaseException:
            exchange.close()
            raise
        return exchange

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()

    async def _call(self, method: str, path: str, kind: type[Answer], body: bytes, within_s: float) -> Answer:
        exchange = self._pool.exchange(method, path, self._headers, body)
        try:
            async with asyncio.timeout(within_s):
                status = await exchange.head()
                data = await _bounded(exchange)
        except TimeoutError:
            raise self._late(within_s) from None
        finally:
            exchange.close()
        # A refused call has a Reply as its body, whatever its usual answer is.
        if not (status == 409 and kind is Reply):
            self._check(status, data)
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            raise Unreachable(f"its answer is not understood: {failure}", sent=True) from None

    def _check(self, status: int, data: bytes) -> None:
        """Raise what an answer that is none means."""
        if status == 403:
            raise Unreachable("it refuses this node's secret: all nodes need the same cluster.secret_file", sent=True)
        if status in (400, 409):
            try:
                reply = msgspec.json.decode(data, type=Reply)
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise Unreachable(f"it answers with status {status}", sent=True) from None
            raise PdctlError(f"node {self.agent.node}: {reply.reason}", reply.hint or None)
        if status != 200:
            raise Unreachable(f"it answers with status {status}", sent=True)

    def _late(self, within_s: float) -> Unreachable:
        return Unreachable(f"{self.agent.text} did not answer within {within_s:g} s", sent=True)


class Agents:
    """The agents of all other nodes. `others`: those that are known now, registered or not."""

    def __init__(
        self,
        others: Callable[[], Sequence[AgentAddress]],
        secret: str,
        tls: ContextFactory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._others = others
        self._secret = secret
        self._tls = tls
        self._clock = clock
        self._clients: dict[str, AgentClient] = {}
        self._quiet: dict[str, tuple[float, Silent]] = {}
        self._limit = asyncio.Semaphore(_AT_ONCE)

    def clients(self) -> dict[str, AgentClient]:
        """A client for each, by node, in the order of the nodes' names."""
        wanted = {agent.node: agent for agent in self._others()}
        for node, client in list(self._clients.items()):
            known = wanted.get(node)
            if known is None or (known.host, known.port) != (client.agent.host, client.agent.port):
                self._clients.pop(node).close()
                self._quiet.pop(node, None)
        for node, agent in wanted.items():
            if node not in self._clients:
                self._clients[node] = AgentClient(agent, self._secret, self._tls)
            self._clients[node].agent = agent
        return dict(sorted(self._clients.items()))

    async def all(
        self, call: Callable[[AgentClient], Awaitable[Answer]], patient: bool = False, within_s: float = _ALL_S
    ) -> dict[str, Answer | Silent]:
        """What each answers, by node. `patient`: ask also those that have just been silent. `within_s`: for all."""
        clients = self.clients()
        deadline = asyncio.get_running_loop().time() + within_s
        found: dict[str, Answer | Silent] = {}

        async def ask(node: str, client: AgentClient) -> None:
            until, silent = self._quiet.get(node, (0.0, Silent("")))
            if self._clock() < until and not patient:
                found[node] = silent
                return
            try:
                async with asyncio.timeout_at(deadline), self._limit:
                    found[node] = await call(client)
                self._quiet.pop(node, None)
            except PdctlError as failure:
                found[node] = Silent(str(failure), refused=True)
            except TimeoutError:
                found[node] = Silent(f"{client.agent.text} was not asked in time: too many do not answer")
            except Unreachable as failure:
                found[node] = silent = Silent(str(failure))
                self._quiet[node] = (self._clock() + _QUIET_S, silent)

        async with asyncio.TaskGroup() as tasks:
            for node, client in clients.items():
                tasks.create_task(ask(node, client))
        return {node: found[node] for node in clients}

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()


async def _bounded(exchange: Exchange) -> bytes:
    """The rest of an answer. Raises Unreachable if it is too large."""
    parts, size = [], 0
    while (data := await exchange.read()) is not None:
        size += len(data)
        if size > _MOST_BYTES:
            raise Unreachable(f"its answer is larger than {_MOST_BYTES} bytes", sent=True)
        parts.append(data)
    return b"".join(parts)
