"""The proxy's ASGI application: a raw path for completions and chat, Starlette for the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pdctl import __version__
from pdctl.net.openai.api import ApiError
from pdctl.proxy.engines.routing import Ask, choose, round_robin
from pdctl.proxy.request.generate import Completions
from pdctl.proxy.surface.not_here import API_ERRORS
from pdctl.proxy.surface.openapi import description
from pdctl.proxy.surface.tokens import Tokens, check_key, error_answer
from pdctl.proxy.telemetry.scrape import ServiceScrape
from pdctl.proxy.translation import APIS
from pdctl.proxy_wire import ProxyConfig

_GENERATE = {"/v1/completions": False, "/v1/chat/completions": True}


@dataclass(slots=True)
class ProxyApp:
    """ASGI entry point."""

    completions: Completions
    rest: Starlette

    @classmethod
    def of(cls, config: ProxyConfig, completions: Completions, more: Sequence[Route] = ()) -> ProxyApp:
        """The application; `more`: internal routes."""
        routes = [*Surface(config, completions).routes(), *Tokens(completions).routes(), *more]
        return cls(completions, Starlette(routes=routes, exception_handlers=API_ERRORS))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"] in _GENERATE:
            await self.completions(scope, receive, send, _GENERATE[scope["path"]])
        elif scope["type"] == "http" and scope["path"] in APIS:
            await self.completions(scope, receive, send, True, APIS[scope["path"]])
        else:
            await self.rest(scope, receive, send)


class Surface:
    """All endpoints that neither generate nor tokenize."""

    def __init__(self, config: ProxyConfig, completions: Completions) -> None:
        self._config = config
        self._completions = completions
        self._shared = completions.shared
        self._created = int(time.time())
        self._scrape = ServiceScrape(self._shared.pool, Path(config.run_dir) / "control.sock")

    def routes(self) -> list[Route]:
        """The routes for Starlette."""
        return [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/version", self._version),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/metrics/proxy", self._metrics),
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
        shared, queue = self._shared, self._completions.door.admission.queue
        as_vllm = request.url.path.endswith("/vllm")
        text = shared.metrics.render(shared.pool, queue, shared.quarantine.count, shared.releases.failed, as_vllm)
        if request.url.path == "/metrics":
            text += await self._scrape.text()
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _openapi(self, _: Request) -> Response:
        config = self._config
        return _json(200, description(config.model, config.max_model_len, self._completions.unknown.refuse))

    def _refused(self, request: Request) -> Response | None:
        """The error for a client without a valid API key; None if it has one."""
        try:
            check_key(self._completions, request)
        except ApiError as failure:
            return error_answer(failure)
        return None


def _json(status: int, body: object) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
