"""Endpoints that take one message and answer with one: calls by peers, the supervisor, and other projects' routers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pdctl.net.openai.api import ApiError

# These messages are small: a hand-over of the longest prompt has a few thousand block ids.
_MAX_BODY = 4 * 2**20

Call = TypeVar("Call", bound=msgspec.Struct)
Done = msgspec.Struct | Awaitable[msgspec.Struct]


class Posted(Generic[Call]):
    """One POST endpoint: check the sender and the size, decode the message, act on it. `refused` gives the error for a
    sender that may not call it, and `forbidden` for one that may not make this call."""

    def __init__(
        self,
        kind: type[Call],
        act: Callable[[Call], Done],
        refused: Callable[[Request], ApiError | None] | None = None,
        forbidden: Callable[[Request, Call], ApiError | None] | None = None,
    ) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._act = act
        self._refused = refused
        self._forbidden = forbidden

    async def answer(self, request: Request) -> Response:
        """The endpoint, for Starlette."""
        if self._refused is not None and (failure := self._refused(request)) is not None:
            return refusal(failure)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MAX_BODY:
                return refusal(ApiError(413, f"the body is larger than {_MAX_BODY} bytes"))
        try:
            call = self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            return refusal(ApiError(400, f"malformed call: {failure}"))
        if self._forbidden is not None and (refused := self._forbidden(request, call)) is not None:
            return refusal(refused)
        done = self._act(call)
        return answer(await done if isinstance(done, Awaitable) else done)


def answer(body: msgspec.Struct | str) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(body), media_type="application/json")


def refusal(failure: ApiError) -> Response:
    """An error in OpenAI's format."""
    return Response(failure.body(), failure.status, media_type="application/json")
