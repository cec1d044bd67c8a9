"""The proxy's ASGI application: a raw path for completions and chat, Starlette for the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pdctl import __version__
from pdctl.net import asgi
from pdctl.net.asgi import OPENAI_ERRORS
from pdctl.net.http_client import Unreachable, header_lines
from pdctl.net.openai_api import ApiError, decode_request
from pdctl.proxy.client.unknown_fields import header
from pdctl.proxy.engines.pool import Engine
from pdctl.proxy.engines.routing import Ask, choose, round_robin
from pdctl.proxy.request.generate import Completions
from pdctl.proxy.surface.openapi import description
from pdctl.wire import ProxyConfig

_GENERATE = {"/v1/completions": False, "/v1/chat/completions": True}
_TOKENIZE_S = 10.0
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_JSON = header_lines({"content-type": "application/json"})


@dataclass(slots=True)
class ProxyApp:
    """ASGI entry point."""

    completions: Completions
    rest: Starlette

    @classmethod
    def of(cls, config: ProxyConfig, completions: Completions, more: Sequence[Route] = ()) -> ProxyApp:
        """The application; `more`: internal routes."""
        routes = [*Surface(config, completions).routes(), *more]
        return cls(completions, Starlette(routes=routes, exception_handlers=OPENAI_ERRORS))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"] in _GENERATE:
            await self.completions(scope, receive, send, _GENERATE[scope["path"]])
        else:
            await self.rest(scope, receive, send)


class Surface:
    """All endpoints that do not generate."""

    def __init__(self, config: ProxyConfig, completions: Completions) -> None:
        self._config = config
        self._completions = completions
        self._shared = completions.shared
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """The routes for Starlette."""
        return [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._tokenize, methods=["POST"]),
            Route("/version", self._version),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/metrics/vllm", self._metrics),
            Route("/openapi.json", self._openapi),
        ]

    async def _models(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        return _json(200, {"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        name = request.path_params["name"]
        if name != self._config.model:
            raise HTTPException(404, f"the model {name!r} does not exist; this service serves {self._config.model!r}")
        return _json(200, self._card())

    def _card(self) -> dict[str, object]:
        return {
            "id": self._config.model, "object": "model", "created": self._created, "owned_by": "pdctl",
            "max_model_len": self._config.max_model_len,
        }  # fmt: skip

    async def _tokenize(self, request: Request) -> Response:
        """Forward to any engine: all have the same tokenizer."""
        if refused := self._refused(request):
            return refused
        try:
            encoding = request.headers.get("content-encoding", "").encode("latin-1")
            body = await asgi.read_body(request.receive, self._completions.max_body, encoding)
            body, ignored = self._known_part(body, request.url.path)
            engine = self._any_engine()
            answer = await engine.client.request(
                "POST", request.url.path, engine.headers + _JSON, body, timeout_s=_TOKENIZE_S
            )
        except ApiError as failure:
            return _error(failure)
        except Unreachable as failure:
            return _error(ApiError(503, str(failure), "service_unavailable", retry_after=1))
        told = [header(ignored)] if ignored else []
        headers = {name.decode(): value.decode() for name, value in told}
        return Response(answer.body, answer.status, headers, media_type="application/json")

    def _known_part(self, body: bytes, path: str) -> tuple[bytes, list[str]]:
        """The body without the fields that no engine knows, and their names."""
        known = self._shared.pool.known_fields(path)
        if known is None:
            return body, []
        fields = decode_request(_decode_fields, body)
        ignored = self._completions.unknown.of(fields, known)
        if not ignored:
            return body, []
        self._completions.note_ignored(ignored)
        return msgspec.json.encode({name: fields[name] for name in fields if name in known}), ignored

    def _any_engine(self) -> Engine:
        now = time.monotonic()
        found = next((engine for engine in self._shared.pool.engines if engine.usable(now)), None)
        if found is None:
            raise ApiError(503, "no engine is ready", "service_unavailable", retry_after=5)
        return found

    async def _version(self, _: Request) -> Response:
        return _json(200, {"version": __version__})

    async def _health(self, _: Request) -> Response:
        """200 if a request sent now would find an engine."""
        ask = Ask(0.0, 0, 0.0, 1.0, 1.0)
        able = choose(round_robin, self._shared.pool.views(), ask) is not None
        return _json(
            200 if able else 503, {"ok": able, "engines": {e.name: e.healthy for e in self._shared.pool.engines}}
        )

    async def _ready(self, _: Request) -> Response:
        """200 if every engine is available."""
        now = time.monotonic()
        missing = [engine.name for engine in self._shared.pool.engines if not engine.usable(now)]
        return _json(503 if missing else 200, {"ready": not missing, "missing": missing})

    async def _metrics(self, request: Request) -> Response:
        shared, door = self._shared, self._completions.door
        as_vllm = request.url.path.endswith("/vllm")
        text = shared.metrics.render(
            shared.pool, door.waiting, shared.quarantine.count, shared.releases.failed, as_vllm
        )
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _openapi(self, _: Request) -> Response:
        config = self._config
        return _json(200, description(config.model, config.max_model_len, self._completions.unknown.refuse))

    def _refused(self, request: Request) -> Response | None:
        """The error for a client without a valid API key; None if it has one."""
        try:
            self._completions.keys.name_of(request.headers.get("authorization", "").encode("latin-1"))
        except ApiError as failure:
            return _error(failure)
        return None


def _error(failure: ApiError) -> Response:
    headers = {} if failure.retry_after is None else {"retry-after": str(failure.retry_after)}
    return Response(failure.body(), failure.status, headers, media_type="application/json")


def _json(status: int, body: object) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
