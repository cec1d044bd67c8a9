"""What `pdctl doctor` asks of a cluster: a report of every node, and transfers between two of them.

The node that the user asks brings the answers together. A node that serves bytes for a transfer does so while the
caller's connection is open: nothing is left when either of them dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, TypeVar
from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pdctl.control_api.examination_messages import (
    Clock,
    ClusterExamination,
    ExamineOrder,
    NodeExamination,
    NodeReport,
    ReadOrder,
    ServeOrder,
    TransferOrder,
    TransferResult,
)
from pdctl.errors import PdctlError
from pdctl.net.asgi import send_part, start_stream, while_connected
from pdctl.net.http_client import Unreachable
from pdctl.supervisor.surface.api import TooLarge, answer, body_of, encoded
from pdctl.supervisor.surface.cluster.agents import AgentClient, Agents, Silent

Message = TypeVar("Message", bound=msgspec.Struct)

# A node reads its devices, its packages and its GPUs; etcd may not answer meanwhile.
EXAMINE_S = 60.0
# Two processes are started, each loads a library, and the bytes are moved about forty times.
TRANSFER_S = 180.0
_CLOCK_TRIES = 3
_HEARTBEAT_S = 1.0


class Examining(Protocol):
    """What a node does for `pdctl doctor`. Every method may raise PdctlError with the reason and a hint."""

    async def report(self, order: ExamineOrder) -> NodeReport:
        """Inspect this node."""
        ...

    def serving(self, order: ServeOrder) -> AbstractAsyncContextManager[str]:
        """Serve known bytes meanwhile; gives their address."""
        ...

    async def read(self, order: ReadOrder) -> TransferResult:
        """Read the bytes at an address, and time that."""
        ...


class Examinations:
    """`here`: this node; `node`: its name; `agents`: those of the others."""

    def __init__(self, here: Examining, node: str, agents: Agents) -> None:
        self._here = here
        self._node = node
        self._agents = agents

    def routes(self) -> list[Route]:
        """For the user of the service."""
        return [
            Route("/v1/doctor", _taking(ExamineOrder, self.examine), methods=["POST"]),
            Route("/v1/doctor/transfer", _taking(TransferOrder, self.transfer), methods=["POST"]),
        ]

    def node_routes(self) -> list[Route]:
        """For other agents."""
        return [
            Route("/v1/cluster/clock", _clock),
            Route("/v1/cluster/doctor", _taking(ExamineOrder, self._here.report), methods=["POST"]),
            Route("/v1/cluster/transfer", self._serve),
            Route("/v1/cluster/transfer", _taking(ReadOrder, self._here.read), methods=["POST"]),
        ]

    async def examine(self, order: ExamineOrder) -> ClusterExamination:
        """The reports of all nodes."""

        async def ask(agent: AgentClient) -> NodeExamination:
            ahead, error = await _clock_of(agent)
            report = await agent.post("/v1/cluster/doctor", order, NodeReport, EXAMINE_S)
            return NodeExamination(node=agent.agent.node, report=report, clock_s=ahead, clock_error_s=error)

        own, others = await asyncio.gather(
            self._own_report(order), self._agents.all(ask, patient=True, within_s=EXAMINE_S)
        )
        told = [
            NodeExamination(node=node, reason=found.reason) if isinstance(found, Silent) else found
            for node, found in others.items()
        ]
        return ClusterExamination(nodes=tuple(sorted([own, *told], key=lambda one: one.node)))

    async def transfer(self, order: TransferOrder) -> TransferResult:
        """Let one node read from another. Raises PdctlError."""
        if order.serving == order.reading:
            raise PdctlError("a transfer needs two nodes", "one machine's own: pdctl doctor transfer")
        clients = self._agents.clients()
        known = sorted([self._node, *clients])
        for node in (order.serving, order.reading):
            if node not in known:
                raise PdctlError(f"the cluster has no node {node!r}", f"nodes: {', '.join(known)}")
        try:
            async with asyncio.timeout(TRANSFER_S), self._serving(clients, order) as address:
                return await self._read(clients, order, address)
        except Unreachable as failure:
            raise PdctlError(f"a node does not answer: {failure}", "see: pdctl status") from None
        except TimeoutError:
            raise PdctlError(f"the transfer took more than {TRANSFER_S:g} s") from None

    # -- parts ---------------------------------------------------------------------------------------------

    async def _own_report(self, order: ExamineOrder) -> NodeExamination:
        try:
            return NodeExamination(node=self._node, report=await self._here.report(order))
        except PdctlError as failure:
            return NodeExamination(node=self._node, reason=str(failure))

    def _serving(self, clients: Mapping[str, AgentClient], order: TransferOrder) -> AbstractAsyncContextManager[str]:
        wanted = ServeOrder(transport=order.transport, protocol=order.protocol, mib=order.mib)
        client = clients.get(order.serving)
        return self._here.serving(wanted) if client is None else _served_by(client, wanted)

    async def _read(self, clients: Mapping[str, AgentClient], order: TransferOrder, address: str) -> TransferResult:
        wanted = ReadOrder(transport=order.transport, protocol=order.protocol, mib=order.mib, address=address)
        client = clients.get(order.reading)
        if client is None:
            return await self._here.read(wanted)
        return await client.post("/v1/cluster/transfer", wanted, TransferResult, TRANSFER_S)

    async def _serve(self, request: Request) -> ASGIApp:
        """Serve bytes while the caller stays: the answer has their address, and no end."""
        try:
            order = msgspec.convert(dict(request.query_params), ServeOrder, strict=False)
        except msgspec.ValidationError as failure:
            return answer(f"not a valid order: {failure}")

        async def serve(_: Scope, receive: Receive, send: Send) -> None:
            await start_stream(send)
            await while_connected(receive, lambda: self._tell_address(order, send))

        return serve

    async def _tell_address(self, order: ServeOrder, send: Send) -> None:
        try:
            async with asyncio.timeout(TRANSFER_S), self._here.serving(order) as address:
                await send_part(send, msgspec.json.encode(_Served(address=address)) + b"\n")
                while True:
                    # A caller that has gone is noticed when something is sent.
                    await asyncio.sleep(_HEARTBEAT_S)
                    await send_part(send, b"\n")
        except TimeoutError:
            await send_part(send, b"", last=True)
        except PdctlError as failure:
            await send_part(send, msgspec.json.encode(_Served(reason=str(failure))) + b"\n", last=True)


class _Served(msgspec.Struct, frozen=True, kw_only=True):
    """Where a node serves bytes, or why it does not."""

    address: str = ""
    reason: str = ""


@asynccontextmanager
async def _served_by(client: AgentClient, order: ServeOrder) -> AsyncIterator[str]:
    """The address of bytes that another node serves. Raises PdctlError, Unreachable."""
    exchange = await client.stream(f"/v1/cluster/transfer?{urlencode(msgspec.to_builtins(order))}")
    try:
        data = b""
        while not data.endswith(b"\n") and (part := await exchange.read()) is not None:
            data += part
        try:
            served = msgspec.json.decode(data, type=_Served)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            raise Unreachable(f"its answer is not understood: {failure}", sent=True) from None
        if not served.address:
            raise PdctlError(f"node {client.agent.node}: {served.reason}")
        yield served.address
    finally:
        exchange.close()


def _taking(
    kind: type[Message], act: Callable[[Message], Awaitable[msgspec.Struct]]
) -> Callable[[Request], Awaitable[Response]]:
    """A route that takes a message and answers with another."""

    async def route(request: Request) -> Response:
        try:
            order = msgspec.json.decode(await body_of(request), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, TooLarge) as failure:
            return answer(f"not a valid order: {failure}")
        return encoded(await act(order))

    return route


async def _clock(_: Request) -> Response:
    return encoded(Clock(time.time()))


async def _clock_of(agent: AgentClient) -> tuple[float | None, float]:
    """Seconds by which its clock is ahead of ours, and the largest error; the best of some tries."""
    best: tuple[float | None, float] = (None, 0.0)
    for _ in range(_CLOCK_TRIES):
        with contextlib.suppress(PdctlError):
            begun, before = time.monotonic(), time.time()
            there = (await agent.get("/v1/cluster/clock", Clock)).at
            half = (time.monotonic() - begun) / 2
            if best[0] is None or half < best[1]:
                best = (there - before - half, half)
    return best
