"""The calls of the control API: docs/status-json.md lists them."""

from __future__ import annotations

from typing import TypeVar, get_args

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pdctl.control_api import DashboardOrder, Exits, Node, Reply, RoleOrder, Stopping, TopologyOrder, UpgradeOrder, Verb
from pdctl.errors import ConfigError, PdctlError
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.supervisor.rundir.journal_reader import BadCursor
from pdctl.supervisor.surface.controlled import Controlled, LogPlace
from pdctl.supervisor.surface.events import Streams

_MOST_BYTES = 16 * 2**20
_LONGEST_NUMBER = 12
_VERBS: dict[str, Verb] = {verb: verb for verb in get_args(Verb)}


class TooLarge(Exception):
    """A body that is larger than any message."""


def application(service: Controlled, streams: Streams) -> Starlette:
    """The whole control API."""
    return Starlette(routes=Api(service, streams).routes(), exception_handlers={PdctlError: refusal})


class Api:
    """The routes, for a service and its events."""

    def __init__(self, service: Controlled, streams: Streams) -> None:
        self._service = service
        self._streams = streams

    def routes(self) -> list[Route]:
        """All calls, for the user of the service."""
        return [
            *self.node_routes(),
            Route("/v1/plan", self.plan),
            Route("/v1/nodes", self.nodes),
            Route("/v1/nodes/add", self.add_node, methods=["POST"]),
            Route("/v1/nodes/remove", self.remove_node, methods=["POST"]),
            Route("/v1/dashboard", self.dashboard, methods=["POST"]),
            Route("/v1/apply", self.apply, methods=["POST"]),
            Route("/v1/upgrade", self.upgrade, methods=["POST"]),
            Route("/v1/cluster/topology", self.topology),
            Route("/v1/cluster/topology", self.publish, methods=["POST", "PUT"]),
            Route("/v1/cluster/topology", self.withdraw, methods=["DELETE"]),
            Route("/v1/stop", self.stop, methods=["POST"]),
            *self._service.more,
        ]

    def node_routes(self) -> list[Route]:
        """Calls that other nodes of a cluster may make too: none of them can bring a command line."""
        return [
            Route("/v1/status", self.status),
            Route("/v1/exits", self.exits),
            Route("/v1/events", self.events),
            Route("/v1/logs", self.logs),
            Route("/v1/logs/{name:path}", self.log),
            Route("/v1/keys", self.keys),
            Route("/v1/kv", self.kv),
            Route("/v1/kv/revoke", self.revoke, methods=["POST"]),
            # A process of a cluster is NODE/NAME where its name alone is not enough.
            Route("/v1/processes/{name:path}/role", self.role, methods=["POST"]),
            Route("/v1/processes/{name:path}/{verb}", self.ask, methods=["POST"]),
        ]

    async def status(self, request: Request) -> Response:
        # A client that waits for a state polls often and needs no measurements, which cost a call to each engine.
        if request.query_params.get("measurements") == "0":
            return encoded(await self._service.status())
        return encoded(await self._service.fresh_status())

    async def plan(self, _: Request) -> Response:
        return encoded(self._service.local.plan)

    async def exits(self, _: Request) -> Response:
        return encoded(Exits(exits=await self._service.exits()))

    async def events(self, request: Request) -> ASGIApp:
        # A browser that comes back asks as it did at first, and says in a header how far it got.
        cursor = request.headers.get("last-event-id") or request.query_params.get("after", "")
        try:
            return self._streams.after(cursor, follow=request.query_params.get("follow") != "0")
        except BadCursor as failure:
            return encoded(Reply(ok=False, reason=str(failure)), 400)

    async def logs(self, _: Request) -> Response:
        return encoded(await self._service.log_names())

    async def log(self, request: Request) -> Response:
        query = request.query_params
        last = query.get("last", "0")
        place = LogPlace(
            place=query.get("after", ""),
            previous=query.get("previous") == "1",
            last=int(last) if last.isdecimal() and len(last) < _LONGEST_NUMBER else 0,
        )
        try:
            return encoded(await self._service.log_part(request.path_params["name"], place))
        except LookupError as failure:
            return answer(str(failure.args[0]))

    async def keys(self, _: Request) -> Response:
        return encoded(await self._service.keys())

    async def kv(self, _: Request) -> Response:
        return encoded(await self._service.leases())

    async def revoke(self, request: Request) -> Response:
        reply = await self._service.revoke(request.query_params.get("lease", ""))
        return encoded(Reply(ok=reply.ok, reason=reply.reason))

    async def ask(self, request: Request) -> Response:
        name, verb = request.path_params["name"], _VERBS.get(request.path_params["verb"])
        if verb is None:
            return answer(f"unknown verb {request.path_params['verb']!r}")
        return answer(await self._service.ask(name, verb, request.query_params.get("drain") == "1"))

    async def role(self, request: Request) -> Response:
        call = await order_of(request, RoleOrder, "change of a role")
        return answer(await self._service.change_role(request.path_params["name"], call))

    async def nodes(self, _: Request) -> Response:
        return encoded(await self._service.local.nodes())

    async def add_node(self, request: Request) -> Response:
        node = await order_of(request, Node, "registration")
        return answer(self._service.local.add_node(node))

    async def remove_node(self, request: Request) -> Response:
        return answer(self._service.local.remove_node(request.query_params.get("name", "")))

    async def dashboard(self, request: Request) -> Response:
        order = await order_of(request, DashboardOrder, "order")
        reply = self._service.local.show(order)
        return encoded(reply, 200 if reply.ok else 409)

    async def apply(self, request: Request) -> Response:
        wanted = await order_of(request, Plan, "plan")
        if request.query_params.get("dry_run") == "1":
            return encoded(await self._service.changes(wanted))
        return answer(await self._service.apply(wanted))

    async def upgrade(self, request: Request) -> Response:
        order = await order_of(request, UpgradeOrder, "order")
        return answer(await self._service.local.upgrade(order))

    async def topology(self, _: Request) -> Response:
        return encoded(await self._service.topology())

    async def publish(self, request: Request) -> Response:
        order = await order_of(request, TopologyOrder, "topology order")
        reply = await self._service.publish(order)
        return encoded(reply, 200 if reply.ok else 409)

    async def withdraw(self, _: Request) -> Response:
        return answer(await self._service.withdraw())

    async def stop(self, _: Request) -> Response:
        self._service.local.stop()
        return encoded(Stopping(), 202)


Order = TypeVar("Order")


async def order_of(request: Request, kind: type[Order], word: str) -> Order:
    """The body of a call. Raises PdctlError, which refuses the call."""
    try:
        return msgspec.json.decode(await body_of(request), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, TooLarge) as failure:
        raise PdctlError(f"not a valid {word}: {failure}") from failure


async def body_of(request: Request) -> bytes:
    """The whole body. Raises TooLarge."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise TooLarge(f"more than {_MOST_BYTES} bytes")
    return b"".join(parts)


def refusal(_: Request, failure: Exception) -> Response:
    """What the user can mend, as a refused call."""
    assert isinstance(failure, PdctlError)
    told = failure.message
    if isinstance(failure, ConfigError):
        told = "; ".join((told, *(f"line {p.line}: {p.key}: {p.message}" for p in failure.problems)))
    return encoded(Reply(ok=False, reason=told, hint=failure.hint or ""), 409)


def answer(reason: str) -> Response:
    """A reply; a reason is that of a refusal."""
    return encoded(Reply(ok=not reason, reason=reason), 409 if reason else 200)


def encoded(message: msgspec.Struct | Plan | Changes, status: int = 200) -> Response:
    """A message as JSON."""
    return Response(msgspec.json.encode(message), status, media_type="application/json")
