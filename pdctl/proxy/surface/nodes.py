"""LMDeploy's /nodes endpoints, with which its engines register themselves. The supervisor has the members.

Only with `proxy.accept_nodes`, and only with a key of `proxy.node_keys`: an engine that is registered gets the prompts
of all clients. LMDeploy's engines send no Authorization header, but `requests` turns the user and password of a URL
into one, so a key may also be the password of HTTP's basic authentication.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdctl.adapters.lmdeploy import nodes as wire
from pdctl.control_api import ControlClient, Node, Nodes, NodeStatus
from pdctl.errors import PdctlError
from pdctl.net import asgi, http_client
from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.net.openai.api import ApiError, decode_request
from pdctl.proxy.client.keys import API_KEY_HEADER, Keys
from pdctl.proxy.surface.tokens import error_answer
from pdctl.proxy_wire import ProxyConfig

Answer = TypeVar("Answer")
_KIND = "lmdeploy"
_MOST_BYTES = 64 * 1024
# One call to an engine, and the wait for the supervisor, seconds.
_ENGINE_S, _SUPERVISOR_S = 5.0, 15.0
# Concurrent calls to the supervisor. Each takes a thread.
_AT_ONCE = 4
_HOW = "the URL with the key is http://node:KEY@HOST:PORT; or send Authorization: Bearer KEY"
_CHALLENGE = 'Basic realm="pdctl nodes"'


class NodeSurface:
    """The endpoints. `config` returns the current settings."""

    def __init__(self, config: Callable[[], ProxyConfig]) -> None:
        self._config = config
        self._control = ControlClient(Path(config().run_dir))
        self._limit = asyncio.Semaphore(_AT_ONCE)

    def routes(self) -> list[Route]:
        """The routes for Starlette."""
        return [
            Route("/nodes/add", self._guarded(self._add), methods=["POST"]),
            Route("/nodes/remove", self._guarded(self._remove), methods=["POST"]),
            Route("/nodes/status", self._guarded(self._status)),
            Route("/nodes/terminate", self._guarded(self._terminate), methods=["POST"]),
            Route("/nodes/terminate_all", self._guarded(self._terminate_all)),
        ]

    # -- endpoints -----------------------------------------------------------------------------------------

    async def _add(self, request: Request) -> object:
        asked, host, port = await self._asked(request)
        status = asked.status or await self._known(host, port)
        try:
            role = wire.role_of(status.role)
            wire.check_host(host, role)
            node = Node(kind=_KIND, role=role, host=host, port=port, models=status.models, speed=status.speed)
        except ValueError as failure:
            raise ApiError(400, str(failure)) from None
        if not node.models:
            node = msgspec.structs.replace(node, models=await _models_of(node))
        reply = await self._supervisor(lambda: self._control.add_node(node))
        if not reply.ok:
            raise ApiError(409, reply.reason, "conflict_error")
        return wire.ADDED

    async def _remove(self, request: Request) -> object:
        _, host, port = await self._asked(request)
        await self._forget(_name(host, port))
        return wire.DELETED

    async def _status(self, _: Request) -> object:
        return {node.url: _shown(node) for node in (await self._nodes()).nodes}

    async def _terminate(self, request: Request) -> object:
        _, host, port = await self._asked(request)
        await self._forget(_name(host, port))
        if reason := await _end(host, port):
            raise ApiError(502, reason, "bad_upstream")
        return wire.TERMINATED

    async def _terminate_all(self, _: Request) -> object:
        nodes = (await self._nodes()).nodes
        for node in nodes:
            await self._forget(node.name)
        found = await asyncio.gather(*(_end(node.host, node.port) for node in nodes))
        if reasons := [reason for reason in found if reason]:
            raise ApiError(502, "; ".join(reasons), "bad_upstream")
        return wire.ALL_TERMINATED

    # -- parts ---------------------------------------------------------------------------------------------

    def _guarded(self, endpoint: Callable[[Request], Awaitable[object]]) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint for callers with a key, with errors in OpenAI's format."""

        async def guarded(request: Request) -> Response:
            try:
                await asyncio.to_thread(self._check_key, request)
                answer = await endpoint(request)
            except ApiError as failure:
                refused = error_answer(failure)
                if failure.status == 401:
                    refused.headers["www-authenticate"] = _CHALLENGE
                return refused
            return Response(msgspec.json.encode(answer), media_type="application/json")

        return guarded

    def _check_key(self, request: Request) -> None:
        """Raises ApiError. The file is read each time: registrations are rare, and a removed key must not work."""
        given = request.headers.get("authorization", "").encode("latin-1")
        api_key = request.headers.get(API_KEY_HEADER.decode(), "").encode("latin-1")
        path = self._config().node_keys
        if not path:
            # The loader refuses this. Keys without a file would accept everyone.
            raise ApiError(503, "this service has no node_keys", "service_unavailable")
        try:
            keys = Keys(path)
        except PdctlError as failure:
            raise ApiError(503, str(failure), "service_unavailable") from None
        try:
            keys.name_of(given, password_of(given) or api_key)
        except ApiError as failure:
            raise ApiError(401, f"{failure.message}; here, one of node_keys: {_HOW}", failure.kind) from None

    async def _asked(self, request: Request) -> tuple[wire.Registration, str, int]:
        """The body, with host and port of its URL. Raises ApiError."""
        encoding = request.headers.get("content-encoding", "").encode("latin-1")
        body = await asgi.read_body(request.receive, _MOST_BYTES, encoding)
        asked = decode_request(wire.decode_registration, body)
        caller = request.client.host if request.client else ""
        try:
            return asked, *wire.address_of(asked.url, caller)
        except ValueError as failure:
            raise ApiError(400, str(failure), param="url") from None

    async def _known(self, host: str, port: int) -> wire.Status:
        """What an earlier registration has said, without the models. LMDeploy's engines do not tell their role."""
        name = _name(host, port)
        known = next((node for node in (await self._nodes()).nodes if node.name == name), None)
        return wire.Status() if known is None else wire.Status(wire.number_of(known.role), speed=known.speed)

    async def _forget(self, name: str) -> None:
        reply = await self._supervisor(lambda: self._control.remove_node(name))
        if not reply.ok:
            raise ApiError(404, reply.reason, "not_found_error")

    async def _nodes(self) -> Nodes:
        return await self._supervisor(self._control.nodes)

    async def _supervisor(self, call: Callable[[], Answer]) -> Answer:
        """The answer of a call to the supervisor. Raises ApiError."""
        try:
            async with asyncio.timeout(_SUPERVISOR_S), self._limit:
                return await asyncio.to_thread(call)
        except (PdctlError, TimeoutError) as failure:
            reason = str(failure) or f"the supervisor did not answer within {_SUPERVISOR_S:g} s"
            raise ApiError(503, reason, "service_unavailable", retry_after=1) from None


def password_of(authorization: bytes) -> bytes:
    """The password of HTTP's basic authentication; b"" for anything else. The user's name does not matter."""
    scheme, _, given = authorization.partition(b" ")
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


async def _models_of(node: Node) -> tuple[str, ...]:
    """The models that an engine says it serves. Raises ApiError."""
    try:
        answer = await _get(node.host, node.port, wire.MODELS_PATH)
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        return wire.models_of(answer.body)
    except (Unreachable, ValueError) as failure:
        raise ApiError(502, f"{node.url}{wire.MODELS_PATH}: {failure}", "bad_upstream") from None


async def _end(host: str, port: int) -> str:
    """Have an engine end itself. Returns why it did not, or ""."""
    name = _name(host, port)
    try:
        answer = await _get(host, port, wire.TERMINATE_PATH)
    except Unreachable as failure:
        return f"{name} was removed, but did not answer at {wire.TERMINATE_PATH}: {failure}"
    if answer.status == 200:
        return ""
    said = answer.body[:300].decode(errors="replace")
    return f"{name} was removed, but did not end: status {answer.status}: {said}"


async def _get(host: str, port: int, path: str) -> http_client.Response:
    pool = ConnectionPool(host, port)
    try:
        return await pool.request("GET", path, timeout_s=_ENGINE_S)
    finally:
        pool.close()


def _shown(node: NodeStatus) -> wire.Status:
    return wire.Status(wire.number_of(node.role), node.models, node.unfinished, node.latency, node.speed)


def _name(host: str, port: int) -> str:
    return Node(kind=_KIND, role="hybrid", host=host, port=port, models=()).name
