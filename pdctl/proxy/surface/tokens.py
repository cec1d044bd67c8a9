"""Endpoints that only need a tokenizer. The proxy has none: any engine answers, because all have the same one."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdctl.net import asgi, http_client
from pdctl.net.http_client import Unreachable, header_lines
from pdctl.net.openai.answers import refusal
from pdctl.net.openai.api import ApiError, decode_request
from pdctl.proxy.client.keys import API_KEY_HEADER
from pdctl.proxy.client.unknown_fields import header
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.request.generate import Completions
from pdctl.proxy.translation import APIS, Api

_TOKENIZE = "/tokenize"
_TOKENIZE_S = 10.0
_JSON = header_lines({"content-type": "application/json"})


class _Counted(msgspec.Struct):
    count: int


_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_counted = msgspec.json.Decoder(_Counted).decode


class Tokens:
    """Tokenization, and token counts of the translated APIs."""

    def __init__(self, completions: Completions) -> None:
        self._completions = completions
        self._pool = completions.shared.pool
        self._counting: dict[str, Api] = {api.count_path: api for api in APIS.values()}

    def routes(self) -> list[Route]:
        """The routes for Starlette."""
        return [
            Route(_TOKENIZE, self._tokenize, methods=["POST"]),
            Route("/detokenize", self._tokenize, methods=["POST"]),
            *(Route(path, self._count, methods=["POST"]) for path in self._counting),
        ]

    async def _tokenize(self, request: Request) -> Response:
        try:
            check_key(self._completions, request)
            body, ignored = self._known_part(await self._body(request), request.url.path)
            answer = await self._from_engine(request.url.path, body)
        except ApiError as failure:
            return error_answer(failure)
        return Response(answer.body, answer.status, _told(ignored), media_type="application/json")

    async def _count(self, request: Request) -> Response:
        """The number of tokens of a request to a translated API."""
        api = self._counting[request.url.path]
        try:
            check_key(self._completions, request)
            body = await self._body(request)
            translated = api.translate(body, self._completions.unknown, counting=True)
            self._completions.note_ignored(translated.ignored)
            counted = await self._counted(translated.tokenize_body())
        except ApiError as failure:
            return error_answer(failure, api.error_body(failure, asgi.request_id(dict(request.headers.raw))))
        return Response(api.counted(counted), 200, _told(translated.ignored), media_type="application/json")

    async def _counted(self, body: bytes) -> int:
        answer = await self._from_engine(_TOKENIZE, body)
        if answer.status != 200:
            failure = refusal(answer.status, answer.body)
            raise ApiError(failure.status, failure.message, failure.kind, failure.param)
        try:
            return _decode_counted(answer.body).count
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            raise ApiError(502, f"the engine's token count is malformed: {failure}", "bad_upstream") from None

    async def _body(self, request: Request) -> bytes:
        encoding = request.headers.get("content-encoding", "").encode("latin-1")
        return await asgi.read_body(request.receive, self._completions.max_body, encoding)

    def _known_part(self, body: bytes, path: str) -> tuple[bytes, list[str]]:
        """The body without the fields that no engine knows, and their names."""
        known = self._pool.known_fields(path)
        if known is None:
            return body, []
        fields = decode_request(_decode_fields, body)
        ignored = self._completions.unknown.of(fields, known)
        if not ignored:
            return body, []
        self._completions.note_ignored(ignored)
        return msgspec.json.encode({name: fields[name] for name in fields if name in known}), ignored

    async def _from_engine(self, path: str, body: bytes) -> http_client.Response:
        engine = self._any_engine()
        try:
            return await engine.client.request("POST", path, engine.headers + _JSON, body, timeout_s=_TOKENIZE_S)
        except Unreachable as failure:
            raise ApiError(503, str(failure), "service_unavailable", retry_after=1) from None

    def _any_engine(self) -> Engine:
        now = time.monotonic()
        found = next((engine for engine in self._pool.engines if engine.usable(now)), None)
        if found is None:
            raise ApiError(503, "no engine is ready", "service_unavailable", retry_after=5)
        return found


def check_key(completions: Completions, request: Request) -> None:
    """Raise ApiError 401 for a client without a valid API key."""
    names = ("authorization", API_KEY_HEADER.decode())
    completions.keys.name_of(*(request.headers.get(name, "").encode("latin-1") for name in names))


def error_answer(failure: ApiError, body: bytes | None = None) -> Response:
    """An error, in OpenAI's format or with the given body."""
    headers = {} if failure.retry_after is None else {"retry-after": str(failure.retry_after)}
    return Response(body or failure.body(), failure.status, headers, media_type="application/json")


def _told(ignored: list[str]) -> dict[str, str]:
    told = [header(ignored)] if ignored else []
    return {name.decode(): value.decode() for name, value in told}
