"""Routes that only the service's own supervisor may use."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Answer = Callable[[Request], Awaitable[Response]]


class Internal:
    """Refuses whoever does not have the run's secret."""

    def __init__(self, secret: str) -> None:
        self._bearer = f"Bearer {secret}" if secret else ""

    def route(self, path: str, answer: Answer, method: str = "GET") -> Route:
        """A route for the supervisor."""

        async def guarded(request: Request) -> Response:
            if not self._is_internal(request):
                return refused(403, "this path is reserved for the service's own supervisor")
            return await answer(request)

        return Route(path, guarded, methods=[method])

    def _is_internal(self, request: Request) -> bool:
        given = request.headers.get("authorization", "").encode("latin-1")
        return bool(self._bearer) and hmac.compare_digest(given, self._bearer.encode())


def refused(status: int, reason: str) -> Response:
    """An error as JSON."""
    return Response(msgspec.json.encode({"error": {"message": reason}}), status, media_type="application/json")


def encoded(answer: msgspec.Struct) -> Response:
    """A message as JSON."""
    return Response(msgspec.json.encode(answer), media_type="application/json")
