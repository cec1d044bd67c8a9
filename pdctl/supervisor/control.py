"""The control API: HTTP on a unix socket of the run directory, for this user only."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from pdctl.serving import Server
from pdctl.wire import LeaseReply


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

    async def fresh_status(self) -> dict[str, object]: ...
    async def leases(self) -> dict[str, object]: ...
    async def revoke(self, lease_id: str) -> LeaseReply: ...
    def stop(self) -> None: ...


async def serve_control(path: Path, service: Controlled) -> None:
    """Answer until cancelled: GET /v1/status, GET /v1/kv, POST /v1/kv/revoke?lease=ID, POST /v1/stop."""

    async def get_status(_: Request) -> JSONResponse:
        return JSONResponse(await service.fresh_status())

    async def get_kv(_: Request) -> JSONResponse:
        return JSONResponse(await service.leases())

    async def post_revoke(request: Request) -> JSONResponse:
        reply = await service.revoke(request.query_params.get("lease", ""))
        return JSONResponse({"ok": reply.ok, "reason": reply.reason})

    async def post_stop(_: Request) -> JSONResponse:
        service.stop()
        return JSONResponse({"stopping": True}, status_code=202)

    routes = [
        Route("/v1/status", get_status),
        Route("/v1/kv", get_kv),
        Route("/v1/kv/revoke", post_revoke, methods=["POST"]),
        Route("/v1/stop", post_stop, methods=["POST"]),
    ]
    app = Starlette(routes=routes)
    with _OwnUserSocket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        os.chmod(path, 0o600)  # noqa: PTH101 - in a coroutine; one system call
        listener.listen(64)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", loop="none", http="h11", ws="none",
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        await Server(config).serve(sockets=[listener])
