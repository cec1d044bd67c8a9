"""The proxy's ASGI application: a raw path for completions and chat, Starlette for the rest."""

from __future__ import annotations

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pdctl import asgi
from pdctl.openai_api import ApiError
from pdctl.proxy import requests
from pdctl.proxy.relay import Relay, Shared
from pdctl.proxy.routing import choose, round_robin
from pdctl.proxy.sinks import Sink, StreamSink, WholeSink
from pdctl.wire import ProxyConfig

_GENERATE = {"/v1/completions": False, "/v1/chat/completions": True}


class ProxyApp:
    """ASGI entry point."""

    def __init__(self, config: ProxyConfig, shared: Shared) -> None:
        self._config = config
        self._shared = shared
        self._rest = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            exception_handlers={HTTPException: _not_here},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["path"] in _GENERATE:
            await self._generate(scope, receive, send)
        else:
            await self._rest(scope, receive, send)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = asgi.header_dict(scope["headers"])
        request_id = asgi.request_id(headers)
        extra = [(b"x-request-id", request_id.encode())]
        path = scope["path"]
        try:
            if scope["method"] != "POST":
                raise ApiError(405, f"{path} takes POST")
            body = await asgi.read_body(receive)
            request = requests.parse(body, path, _GENERATE[path], request_id, self._config.model)
        except ApiError as failure:
            self._shared.metrics.failed(failure.status)
            await asgi.respond_error(send, failure, extra)
            return
        sink: Sink = StreamSink(request, send, extra) if request.stream else WholeSink(request, send, extra)
        await asgi.while_connected(receive, Relay(self._shared, request, sink).run)

    async def _models(self, _: Request) -> Response:
        return _json(200, {"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._config.model:
            raise HTTPException(404, f"the model {name!r} does not exist; this service serves {self._config.model!r}")
        return _json(200, self._card())

    def _card(self) -> dict[str, object]:
        return {
            "id": self._config.model, "object": "model", "created": 0, "owned_by": "pdctl",
            "max_model_len": self._config.max_model_len,
        }  # fmt: skip

    async def _health(self, _: Request) -> Response:
        """200 when a request sent now would find an engine."""
        engines = self._shared.pool.engines
        able = choose(round_robin, [engine.view() for engine in engines], 1.0, 0) is not None
        return _json(200 if able else 503, {"ok": able, "engines": {e.address.name: e.healthy for e in engines}})

    async def _metrics(self, _: Request) -> Response:
        return Response(self._shared.metrics.render(self._shared.pool), media_type="text/plain; version=0.0.4")


async def _not_here(request: Request, failure: Exception) -> Response:
    """Starlette's own refusals, in OpenAI's envelope."""
    assert isinstance(failure, HTTPException)
    message = f"{request.method} {request.url.path}: {failure.detail}"
    return Response(ApiError(failure.status_code, message).body(), failure.status_code, media_type="application/json")


def _json(status: int, body: object) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
