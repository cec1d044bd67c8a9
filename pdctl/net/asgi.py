"""Raw ASGI for the endpoints that generate: read bodies up to a limit, send answers, detect disconnected clients.

Starlette's own responses detect a disconnect only at the next write, but a request that waits for its first token
writes nothing for a long time.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from itertools import count
from typing import Any
from uuid import uuid4

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pdctl.net.content_encoding import unpacked
from pdctl.net.openai.api import ApiError

# ASGI's own message type: https://asgi.readthedocs.io/en/latest/specs/main.html
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY = 16 * 2**20
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

EVENT_STREAM = b"text/event-stream; charset=utf-8"


async def read_body(receive: Receive, limit: int = MAX_BODY, encoding: bytes = b"") -> bytes:
    """The complete body, decompressed according to `encoding` (the content-encoding header).

    Raises ApiError 413 if it is too large, 415 or 400 if it cannot be decompressed, 400 if the client disconnected.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client disconnected before its request was complete")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes")
        if not message.get("more_body"):
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            return await unpacked(body, encoding, limit) if encoding else body


def header_dict(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """ASGI's header pairs as a dict; names are already lower-case."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's x-request-id if it is valid, else a new one."""
    given = headers.get(b"x-request-id")
    return given.decode() if given is not None and _REQUEST_ID.fullmatch(given) else new_name()


_PREFIX = uuid4().hex[:20]
_numbers = count(1)


def new_name() -> str:
    """A unique name: this process's random prefix and a number. Not a secret."""
    return f"{_PREFIX}{next(_numbers):012x}"


async def respond(send: Send, status: int, body: bytes, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    """Send a complete JSON answer."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *(extra or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refused(request: Request, failure: Exception) -> Response:
    """Starlette's own errors in OpenAI's error format."""
    assert isinstance(failure, HTTPException)
    error = ApiError(failure.status_code, f"{request.method} {request.url.path}: {failure.detail}")
    return Response(error.body(), error.status, failure.headers, media_type="application/json")


# For Starlette applications: all errors have OpenAI's error format.
OPENAI_ERRORS = {HTTPException: _refused}


async def respond_error(
    send: Send, failure: ApiError, extra: list[tuple[bytes, bytes]] | None = None, body: bytes | None = None
) -> None:
    """Send an error in OpenAI's error format, or with the given body."""
    more = list(extra or [])
    if failure.retry_after is not None:
        more.append((b"retry-after", str(failure.retry_after).encode()))
    if failure.allow is not None:
        more.append((b"allow", failure.allow.encode()))
    await respond(send, failure.status, failure.body() if body is None else body, more)


async def start_stream(send: Send, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    """Send the head of an event stream."""
    headers = [(b"content-type", EVENT_STREAM), (b"cache-control", b"no-cache"), *(extra or [])]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def send_part(send: Send, data: bytes, last: bool = False) -> None:
    """Send a part of a stream."""
    await send({"type": "http.response.body", "body": data, "more_body": not last})


async def while_connected(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work`; cancel it if the client disconnects."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_cancel_on_disconnect, receive, tasks.cancel_scope)
        await work()
        tasks.cancel_scope.cancel()


async def _cancel_on_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
