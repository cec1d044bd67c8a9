"""The control API: HTTP on a unix socket of the run directory, for this user only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Protocol, get_args

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdctl.control_api import (
    DashboardOrder,
    DashboardReply,
    ExitReport,
    Exits,
    KeysStatus,
    KvStatus,
    MeasuredStatus,
    Node,
    Nodes,
    Reply,
    RoleOrder,
    ServiceStatus,
    Stopping,
    Verb,
)
from pdctl.net.serving import Server, close_connections
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.rundir.journal_reader import BadCursor
from pdctl.supervisor.surface.events import EventStream, EventStreams
from pdctl.wire import LeaseReply

_MOST_BYTES = 16 * 2**20
# Interval between checks that the socket's file exists, seconds.
_LOOK_S = 0.25
# Whoever follows the events has this long to read the last of them, seconds.
_END_S = 1.0
_VERBS: dict[str, Verb] = {verb: verb for verb in get_args(Verb)}


class _TooLarge(Exception):
    """A body that is larger than any message."""


class _OwnUserSocket(socket.socket):
    """A listening unix socket that rejects other users."""

    def accept(self) -> tuple[socket.socket, object]:
        connection, address = super().accept()
        size = struct.calcsize("3i")
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if uid not in (os.getuid(), 0):
            connection.close()
            # asyncio treats this as a client that disconnected during accept, and continues.
            raise ConnectionAbortedError(f"uid {uid} may not use this socket")
        return connection, address


class Controlled(Protocol):
    """What the control API needs of a service."""

    @property
    def plan(self) -> Plan: ...
    @property
    def journal(self) -> Journal: ...
    def status(self) -> ServiceStatus: ...
    async def fresh_status(self) -> MeasuredStatus: ...
    def exits(self) -> tuple[ExitReport, ...]: ...
    async def keys(self) -> KeysStatus: ...
    async def leases(self) -> KvStatus: ...
    async def revoke(self, lease_id: str) -> LeaseReply: ...
    def ask(self, name: str, verb: Verb, drain: bool) -> str: ...
    def change_role(self, name: str, call: RoleOrder) -> str: ...
    async def nodes(self) -> Nodes: ...
    def add_node(self, node: Node) -> str: ...
    def remove_node(self, name: str) -> str: ...
    def show(self, order: DashboardOrder) -> DashboardReply: ...
    def changes(self, wanted: Plan) -> Changes: ...
    def apply(self, wanted: Plan) -> str: ...
    def stop(self) -> None: ...


class _Api:
    def __init__(self, service: Controlled, streams: EventStreams) -> None:
        self._service = service
        self._streams = streams

    def routes(self) -> list[Route]:
        return [
            Route("/v1/status", self.status),
            Route("/v1/plan", self.plan),
            Route("/v1/exits", self.exits),
            Route("/v1/events", self.events),
            Route("/v1/keys", self.keys),
            Route("/v1/kv", self.kv),
            Route("/v1/kv/revoke", self.revoke, methods=["POST"]),
            Route("/v1/nodes", self.nodes),
            Route("/v1/nodes/add", self.add_node, methods=["POST"]),
            Route("/v1/nodes/remove", self.remove_node, methods=["POST"]),
            Route("/v1/processes/{name}/role", self.role, methods=["POST"]),
            Route("/v1/processes/{name}/{verb}", self.ask, methods=["POST"]),
            Route("/v1/dashboard", self.dashboard, methods=["POST"]),
            Route("/v1/apply", self.apply, methods=["POST"]),
            Route("/v1/stop", self.stop, methods=["POST"]),
        ]

    async def status(self, request: Request) -> Response:
        # A client that waits for a state polls often and needs no measurements, which cost a call to each engine.
        if request.query_params.get("measurements") == "0":
            return _encoded(self._service.status())
        return _encoded(await self._service.fresh_status())

    async def plan(self, _: Request) -> Response:
        return _encoded(self._service.plan)

    async def exits(self, _: Request) -> Response:
        return _encoded(Exits(exits=self._service.exits()))

    async def events(self, request: Request) -> EventStream | Response:
        # A browser that comes back asks as it did at first, and says in a header how far it got.
        cursor = request.headers.get("last-event-id") or request.query_params.get("after", "")
        try:
            return self._streams.after(cursor)
        except BadCursor as failure:
            return _encoded(Reply(ok=False, reason=str(failure)), 400)

    async def keys(self, _: Request) -> Response:
        return _encoded(await self._service.keys())

    async def kv(self, _: Request) -> Response:
        return _encoded(await self._service.leases())

    async def revoke(self, request: Request) -> Response:
        reply = await self._service.revoke(request.query_params.get("lease", ""))
        return _encoded(Reply(ok=reply.ok, reason=reply.reason))

    async def ask(self, request: Request) -> Response:
        name, verb = request.path_params["name"], _VERBS.get(request.path_params["verb"])
        if verb is None:
            return _answer(f"unknown verb {request.path_params['verb']!r}")
        return _answer(self._service.ask(name, verb, request.query_params.get("drain") == "1"))

    async def role(self, request: Request) -> Response:
        try:
            call = msgspec.json.decode(await _body(request), type=RoleOrder)
        except (msgspec.DecodeError, UnicodeDecodeError, _TooLarge) as failure:
            return _answer(f"not a valid change of a role: {failure}")
        return _answer(self._service.change_role(request.path_params["name"], call))

    async def nodes(self, _: Request) -> Response:
        return _encoded(await self._service.nodes())

    async def add_node(self, request: Request) -> Response:
        try:
            node = msgspec.json.decode(await _body(request), type=Node)
        except (msgspec.DecodeError, UnicodeDecodeError, _TooLarge) as failure:
            return _answer(f"not a valid registration: {failure}")
        return _answer(self._service.add_node(node))

    async def remove_node(self, request: Request) -> Response:
        return _answer(self._service.remove_node(request.query_params.get("name", "")))

    async def dashboard(self, request: Request) -> Response:
        try:
            order = msgspec.json.decode(await _body(request), type=DashboardOrder)
        except (msgspec.DecodeError, UnicodeDecodeError, _TooLarge) as failure:
            return _answer(f"not a valid order: {failure}")
        reply = self._service.show(order)
        return _encoded(reply, 200 if reply.ok else 409)

    async def apply(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await _body(request), type=Plan)
        except _TooLarge as failure:
            return _answer(f"the plan has {failure}")
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            return _answer(f"not a valid plan: {failure}")
        if request.query_params.get("dry_run") == "1":
            return _encoded(self._service.changes(wanted))
        return _answer(self._service.apply(wanted))

    async def stop(self, _: Request) -> Response:
        self._service.stop()
        return _encoded(Stopping(), 202)


async def _body(request: Request) -> bytes:
    """Raises _TooLarge."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise _TooLarge(f"more than {_MOST_BYTES} bytes")
    return b"".join(parts)


def _answer(reason: str) -> Response:
    return _encoded(Reply(ok=not reason, reason=reason), 409 if reason else 200)


def _encoded(answer: msgspec.Struct | Plan | Changes, status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status, media_type="application/json")


async def serve_control(path: Path, service: Controlled, streams: EventStreams | None = None) -> None:
    """Answer until cancelled: status, plan, events, KV, verbs for single processes, apply, stop; docs/status-json.md.

    A socket file that is removed meanwhile is created again.
    """
    streams = streams or EventStreams(service.journal)
    app = Starlette(routes=_Api(service, streams).routes())
    while True:
        # If its folder is missing too, the supervisor creates that first.
        with contextlib.suppress(FileNotFoundError):
            await _serve_until_removed(path, app, streams)
        await asyncio.sleep(_LOOK_S)


async def _serve_until_removed(path: Path, app: Starlette, streams: EventStreams) -> None:
    """Serve until the socket file is removed. Raises FileNotFoundError if the folder does not exist."""
    _unlink(path)
    with _OwnUserSocket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        os.chmod(path, 0o600)  # noqa: PTH101 - in a coroutine; one system call
        listener.listen(64)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", loop="none", http="h11", ws="none",
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = Server(config)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_stop_when_removed(server, path, streams))
                await server.serve(sockets=[listener])
        finally:
            await _let_go(server, streams)


async def _stop_when_removed(server: Server, path: Path, streams: EventStreams) -> None:
    """Stop the server when the socket file is removed. Returns when the server has ended."""
    ours = _inode(path)
    while not server.should_exit:
        await asyncio.sleep(_LOOK_S)
        if _inode(path) != ours:
            await streams.end(_END_S)
            server.should_exit = True


async def _let_go(server: Server, streams: EventStreams) -> None:
    """Close what a server that was cancelled left open, when everybody who reads has been told the last events."""
    await streams.end(_END_S)
    await close_connections(server)
    await streams.end(_END_S)


def _inode(path: Path) -> int:
    """The inode of a file; 0 if it does not exist."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
