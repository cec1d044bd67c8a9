"""The server of a node's agent, for the agents of other nodes: it answers for its own node only."""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Never

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pdctl.control_api import Reply
from pdctl.errors import PdctlError
from pdctl.net.identity.peers import NodesOnly
from pdctl.net.prompt_protocol import PromptProtocol
from pdctl.net.serving import Server, close_connections, listen_tcp, wants_certificates
from pdctl.supervisor.cluster.entries import Order
from pdctl.supervisor.surface.api import Api, TooLarge, answer, body_of, encoded, refusal
from pdctl.supervisor.surface.cluster.control import Publishing, changes_of
from pdctl.supervisor.surface.controlled import LocalService, OneMachine
from pdctl.supervisor.surface.events import EventStreams

if TYPE_CHECKING:
    from pdctl.net.identity.contexts import Identity

# Connections and calls at once. Above this an agent answers 503.
_MOST_CALLS = 512
# Whoever follows the events has this long to read the last of them, seconds.
_END_S = 1.0


async def serve_agents(
    host: str,
    port: int,
    service: LocalService,
    publishing: Publishing,
    secret: str,
    identity: Identity | None = None,
    reports: Mapping[str, Callable[[], msgspec.Struct]] | None = None,
    more: Sequence[Route] = (),
) -> Never:
    """Answer other agents until cancelled. `identity`: of a cluster with certificates; `reports`: what else a GET of a
    path returns; `more`: further calls. Raises PdctlError if the address cannot be used."""
    try:
        listener = listen_tcp(host, port)
    except OSError as failure:
        told = f"the agent cannot listen at {host}:{port}: {failure.strerror}"
        raise PdctlError(told, "change cluster.agent_port, the same on all nodes, or end what uses the port") from None
    listener.setblocking(False)
    streams = EventStreams(service.journal, marks=True)
    app = guarded(_application(service, publishing, streams, reports or {}, more), secret)
    server = Server(_config(app if identity is None else NodesOnly(app, identity.who.service), identity))
    try:
        await server.serve(sockets=[listener])
    finally:
        await streams.end(_END_S)
        await close_connections(server)
        _close(listener)
    raise AssertionError("it serves until it is cancelled")


def _close(listener: socket.socket) -> None:
    """Close it. A server that was cancelled while it began still watches it, and does not know that itself."""
    if listener.fileno() != -1:
        asyncio.get_running_loop().remove_reader(listener)
        listener.close()


def guarded(app: ASGIApp, secret: str) -> ASGIApp:
    """Refuses whoever does not have the cluster's secret, before anything of the call is read."""
    assert secret, "an agent without a secret would obey everybody"
    bearer = f"Bearer {secret}".encode()

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(given, bearer):
            refused = Reply(ok=False, reason="only agents of this cluster may call: the secret is missing or wrong")
            await encoded(refused, 403)(scope, receive, send)
            return
        await app(scope, receive, send)

    return checked


def _application(
    service: LocalService,
    publishing: Publishing,
    streams: EventStreams,
    reports: Mapping[str, Callable[[], msgspec.Struct]],
    more: Sequence[Route],
) -> Starlette:
    api = Api(OneMachine(service), streams)
    routes = [*api.node_routes(), Route("/v1/cluster/changes", _changes(publishing), methods=["POST"])]
    routes += [*(Route(path, _report(report)) for path, report in reports.items()), *more]
    return Starlette(routes=routes, exception_handlers={PdctlError: refusal})


def _report(report: Callable[[], msgspec.Struct]) -> Callable[[Request], Awaitable[Response]]:
    async def told(_: Request) -> Response:
        return encoded(report())

    return told


def _changes(publishing: Publishing) -> Callable[[Request], Awaitable[Response]]:
    async def changes(request: Request) -> Response:
        try:
            order = msgspec.json.decode(await body_of(request), type=Order)
        except (msgspec.DecodeError, UnicodeDecodeError, TooLarge) as failure:
            return answer(f"not a valid order: {failure}")
        return encoded(await changes_of(publishing, order))

    return changes


def _config(app: ASGIApp, identity: Identity | None) -> uvicorn.Config:
    return uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", loop="none", http=PromptProtocol, ws="none",
        server_header=False, proxy_headers=False, timeout_keep_alive=75, timeout_graceful_shutdown=1,
        limit_concurrency=_MOST_CALLS, ssl_context_factory=wants_certificates(identity),
    )  # fmt: skip
