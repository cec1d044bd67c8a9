"""The control API: HTTP on a unix socket of the run directory, for this user only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Protocol

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from pdctl.net.serving import Server
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.supervisor.unit.verbs import VERBS
from pdctl.wire import LeaseReply

_MOST_BYTES = 16 * 2**20
# Between two looks whether the socket's file is there, seconds.
_LOOK_S = 0.25


class _OwnUserSocket(socket.socket):
    """A listening unix socket that turns away other users."""

    def accept(self) -> tuple[socket.socket, object]:
        connection, address = super().accept()
        size = struct.calcsize("3i")
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if uid not in (os.getuid(), 0):
            connection.close()
            # asyncio takes this for a client that left while being accepted, and goes on.
            raise ConnectionAbortedError(f"uid {uid} is not ours")
        return connection, address


class Controlled(Protocol):
    """What the control API is about."""

    plan: Plan

    def status(self) -> dict[str, object]: ...
    async def fresh_status(self) -> dict[str, object]: ...
    def exits(self) -> list[dict[str, object]]: ...
    async def leases(self) -> dict[str, object]: ...
    async def revoke(self, lease_id: str) -> LeaseReply: ...
    def ask(self, name: str, verb: str, drain: bool) -> str: ...
    def changes(self, wanted: Plan) -> Changes: ...
    def apply(self, wanted: Plan) -> str: ...
    def stop(self) -> None: ...


class _Api:
    def __init__(self, service: Controlled) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        return [
            Route("/v1/status", self.status),
            Route("/v1/plan", self.plan),
            Route("/v1/exits", self.exits),
            Route("/v1/kv", self.kv),
            Route("/v1/kv/revoke", self.revoke, methods=["POST"]),
            Route("/v1/processes/{name}/{verb}", self.ask, methods=["POST"]),
            Route("/v1/apply", self.apply, methods=["POST"]),
            Route("/v1/stop", self.stop, methods=["POST"]),
        ]

    async def status(self, request: Request) -> JSONResponse:
        # Whoever waits for a state asks often, and needs no measurements, for which every engine is asked.
        if request.query_params.get("measurements") == "0":
            return JSONResponse(self._service.status())
        return JSONResponse(await self._service.fresh_status())

    async def plan(self, _: Request) -> JSONResponse:
        return JSONResponse(self._service.plan.to_dict())

    async def exits(self, _: Request) -> JSONResponse:
        return JSONResponse({"exits": self._service.exits()})

    async def kv(self, _: Request) -> JSONResponse:
        return JSONResponse(await self._service.leases())

    async def revoke(self, request: Request) -> JSONResponse:
        reply = await self._service.revoke(request.query_params.get("lease", ""))
        return JSONResponse({"ok": reply.ok, "reason": reply.reason})

    async def ask(self, request: Request) -> JSONResponse:
        name, verb = request.path_params["name"], request.path_params["verb"]
        if verb not in VERBS:
            return _answer(f"no verb {verb!r}")
        return _answer(self._service.ask(name, verb, request.query_params.get("drain") == "1"))

    async def apply(self, request: Request) -> JSONResponse:
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > _MOST_BYTES:
                return _answer(f"a plan of more than {_MOST_BYTES} bytes")
        try:
            wanted = msgspec.json.decode(b"".join(parts), type=Plan)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            return _answer(f"that is no plan: {failure}")
        if request.query_params.get("dry_run") == "1":
            return JSONResponse(self._service.changes(wanted).to_dict())
        return _answer(self._service.apply(wanted))

    async def stop(self, _: Request) -> JSONResponse:
        self._service.stop()
        return JSONResponse({"stopping": True}, status_code=202)


def _answer(reason: str) -> JSONResponse:
    return JSONResponse({"ok": not reason, "reason": reason}, status_code=409 if reason else 200)


async def serve_control(path: Path, service: Controlled) -> None:
    """Answer until cancelled: status, plan, KV, verbs for single processes, apply, stop; docs/status-json.md.

    A socket file that is removed meanwhile is made again.
    """
    app = Starlette(routes=_Api(service).routes())
    while True:
        # Where its folder is missing too, the supervisor makes that first.
        with contextlib.suppress(FileNotFoundError):
            await _serve_until_removed(path, app)
        await asyncio.sleep(_LOOK_S)


async def _serve_until_removed(path: Path, app: Starlette) -> None:
    """Raises FileNotFoundError where the folder does not exist."""
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
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_stop_when_removed(server, path))
            await server.serve(sockets=[listener])


async def _stop_when_removed(server: Server, path: Path) -> None:
    """Until then, and until the server ends by itself."""
    ours = _inode(path)
    while not server.should_exit:
        await asyncio.sleep(_LOOK_S)
        if _inode(path) != ours:
            server.should_exit = True


def _inode(path: Path) -> int:
    """0 where there is no such file."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
