"""HTTP surface of an engine: OpenAI endpoints, leases and state for peers, health and metrics for everyone."""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable
from uuid import uuid4

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pdctl.engine.front import openai
from pdctl.engine.front.core_link import CoreLink
from pdctl.engine.front.generate import Generator, Piece
from pdctl.engine.front.leases import LeaseDesk
from pdctl.engine.front.metrics import render_metrics
from pdctl.engine.front.migrate import KvLost, Migrator
from pdctl.engine.front.openai import ApiError, GenerationRequest
from pdctl.engine.front.text import NoChatTemplate, TextCodec
from pdctl.engine.options import EngineOptions
from pdctl.wire import EngineState, HandOver, HolderCall, LeaseCall, RenewCall

_MAX_BODY = 16 * 2**20
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Reply = tuple[int, bytes]


class EngineService:
    """Everything the endpoints need."""

    def __init__(
        self,
        options: EngineOptions,
        secret: str,
        codec: TextCodec,
        core: CoreLink,
        leases: LeaseDesk,
        migrator: Migrator,
        generator: Generator,
    ) -> None:
        self.options = options
        self.codec = codec
        self.core = core
        self.leases = leases
        self.migrator = migrator
        self.generator = generator
        self._secret = secret

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/completions", _Generate(self, chat=False), methods=["POST"]),
                Route("/v1/chat/completions", _Generate(self, chat=True), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/pdctl/v1/state", self._state),
                Route("/pdctl/v1/leases/{verb}", self._lease_call, methods=["POST"]),
                Route("/pdctl/v1/holders/release", self._release_holder, methods=["POST"]),
            ]
        )

    def is_internal(self, authorization: str) -> bool:
        """Whether a call carries this run's secret. Without a secret nobody is internal."""
        return bool(self._secret) and hmac.compare_digest(authorization.encode(), f"Bearer {self._secret}".encode())

    def accept(self, body: bytes, chat: bool, headers: dict[str, str]) -> GenerationRequest:
        """Check a request and tokenize its prompt. Raises ApiError."""
        ready = self.core.ready
        if ready is None:
            raise ApiError(503, "the model is still loading", "service_unavailable")
        parsed = openai.parse_body(body, chat)
        served = self.options.served_model_name
        if parsed.model not in (None, served):
            raise ApiError(404, f"the model {parsed.model!r} does not exist; this engine serves {served!r}", param="model")
        token_ids = self._prompt_ids(parsed, ready.vocab_size)
        hold, hand_over = self._internal_fields(parsed, headers)
        given = headers.get("x-request-id", "")
        return GenerationRequest(
            request_id=(given if _REQUEST_ID.fullmatch(given) else uuid4().hex) + f".{uuid4().hex[:8]}",
            chat=chat,
            model=served,
            token_ids=token_ids,
            sampling=openai.sampling_of(parsed, len(token_ids), ready.max_model_len),
            stops=openai.stop_strings(parsed),
            stream=bool(parsed.stream) and not hold,
            include_usage=bool(parsed.stream_options and parsed.stream_options.include_usage),
            return_token_ids=bool(parsed.return_token_ids),
            resume=parsed.resume_token_ids or [],
            hold=hold,
            hand_over=hand_over,
        )

    def _prompt_ids(self, body: openai.CompletionBody | openai.ChatBody, vocab_size: int) -> list[int]:
        try:
            ids = self._encode(body)
        except (NoChatTemplate, ValueError) as failure:
            raise ApiError(400, str(failure), param="messages") from None
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ApiError(400, f"prompt token ids must be from 0 to {vocab_size - 1}", param="prompt")
        return ids

    def _encode(self, body: openai.CompletionBody | openai.ChatBody) -> list[int]:
        if isinstance(body, openai.ChatBody):
            return self.codec.encode_chat(body.messages)
        prompt = body.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self.codec.encode(prompt)
        if isinstance(prompt, list) and all(isinstance(item, int) for item in prompt):
            return [int(item) for item in prompt if isinstance(item, int)]
        raise ApiError(400, "send one prompt per request: a string or a list of token ids", param="prompt")

    def _internal_fields(
        self, body: openai.CompletionBody | openai.ChatBody, headers: dict[str, str]
    ) -> tuple[bool, HandOver | None]:
        no_transfer = bytes(body.kv_transfer_params) == b"null"
        if no_transfer and not body.resume_token_ids:
            return False, None
        if not self.is_internal(headers.get("authorization", "")):
            raise ApiError(403, "kv_transfer_params and resume_token_ids are for this service's own processes")
        if no_transfer:
            return False, None
        try:
            asked = msgspec.json.decode(body.kv_transfer_params, type=openai.HoldRequest)
            if asked.do_remote_decode:
                return True, None
            return False, msgspec.json.decode(body.kv_transfer_params, type=HandOver)
        except msgspec.DecodeError as failure:
            raise ApiError(400, f"kv_transfer_params are malformed: {failure}", param="kv_transfer_params") from None

    # -- control endpoints ---------------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        return Response(status_code=200 if self.core.ready else 503)

    async def _models(self, _: Request) -> Response:
        card = {"id": self.options.served_model_name, "object": "model", "created": 0, "owned_by": "pdctl"}
        if self.core.ready:
            card["max_model_len"] = self.core.ready.max_model_len
        return _json(200, msgspec.json.encode({"object": "list", "data": [card]}))

    async def _metrics(self, _: Request) -> Response:
        return Response(render_metrics(self.state(), self.leases.table), media_type="text/plain; version=0.0.4")

    async def _state(self, _: Request) -> Response:
        return _json(200, msgspec.json.encode(self.state()))

    def state(self) -> EngineState:
        """Counts and leases now."""
        ready, books = self.core.ready, self.core.books
        return EngineState(
            name=self.options.name,
            role=self.options.role,
            epoch=self.options.epoch,
            blocks_total=ready.num_blocks if ready else 0,
            blocks_free=books.blocks_free,
            blocks_leased=books.blocks_leased,
            blocks_reserved=books.blocks_reserved,
            running=books.running,
            waiting=books.waiting,
            tokens_total=self.core.tokens_total,
            leases=self.leases.infos(ready.block_bytes if ready else 0),
            transfers={
                "pulls": self.migrator.pulls_total,
                "lost": self.migrator.lost_total,
                "bytes": self.migrator.bytes_total,
                "seconds": round(self.migrator.seconds_total, 6),
            },
        )

    async def _lease_call(self, request: Request) -> Response:
        verbs: dict[str, tuple[type[msgspec.Struct], Callable[..., msgspec.Struct]]] = {
            "claim": (LeaseCall, self.leases.claim),
            "commit": (LeaseCall, self.leases.commit),
            "release": (LeaseCall, self.leases.release),
            "renew": (RenewCall, self.leases.renew),
        }
        verb = request.path_params["verb"]
        if verb not in verbs:
            return _error(ApiError(404, f"unknown lease call {verb!r}"))
        return await self._internal_call(request, *verbs[verb])

    async def _release_holder(self, request: Request) -> Response:
        return await self._internal_call(request, HolderCall, self.leases.release_holder)

    async def _internal_call(
        self, request: Request, kind: type[msgspec.Struct], act: Callable[..., msgspec.Struct]
    ) -> Response:
        if not self.is_internal(request.headers.get("authorization", "")):
            return _error(ApiError(403, "leases are for this service's own processes"))
        try:
            call = msgspec.json.decode(await request.body(), type=kind)
        except msgspec.DecodeError as failure:
            return _error(ApiError(400, f"malformed lease call: {failure}"))
        return _json(200, msgspec.json.encode(act(call)))


class _Generate:
    """POST /v1/completions or /v1/chat/completions as a raw ASGI endpoint: a client that leaves cancels its request."""

    def __init__(self, service: EngineService, chat: bool) -> None:
        self._service = service
        self._chat = chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            body = await _read_body(receive)
            request = self._service.accept(body, self._chat, headers)
        except ApiError as failure:
            await _respond(send, failure.status, failure.body())
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_on_disconnect, receive, tasks.cancel_scope)
            await (self._stream if request.stream else self._whole)(request, send)
            tasks.cancel_scope.cancel()

    async def _whole(self, request: GenerationRequest, send: Send) -> None:
        text, token_ids, last = "", [], None
        try:
            async for piece in self._service.generator.run(request):
                text += piece.text
                token_ids += piece.token_ids
                last = piece
        except (ApiError, KvLost) as failure:
            error = _api_error(failure)
            await _respond(send, error.status, error.body())
            return
        assert last is not None
        body = openai.answer(request, text, token_ids, last.finish_reason or "length", last.hand_over)
        await _respond(send, 200, body)

    async def _stream(self, request: GenerationRequest, send: Send) -> None:
        pieces = self._service.generator.run(request)
        started = False
        count = 0
        try:
            async for piece in pieces:
                if not started:
                    await send(_head(200, b"text/event-stream; charset=utf-8"))
                count += len(piece.token_ids)
                event = openai.chunk(request, piece.text, piece.token_ids, piece.finish_reason, not started)
                started = True
                await send({"type": "http.response.body", "body": event + self._tail(request, piece, count),
                            "more_body": piece.finish_reason is None})  # fmt: skip
        except (ApiError, KvLost) as failure:
            error = _api_error(failure)
            if not started:
                await _respond(send, error.status, error.body())
                return
            await send({"type": "http.response.body", "body": b"data: " + error.body() + b"\n\n", "more_body": False})

    def _tail(self, request: GenerationRequest, piece: Piece, count: int) -> bytes:
        """What follows the last event, in the same write."""
        if piece.finish_reason is None:
            return b""
        return (openai.usage_chunk(request, count) if request.include_usage else b"") + b"data: [DONE]\n\n"


def _api_error(failure: ApiError | KvLost) -> ApiError:
    return ApiError(409, str(failure), "kv_lost") if isinstance(failure, KvLost) else failure


async def _cancel_on_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _read_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client left before its request was complete")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MAX_BODY:
            raise ApiError(413, f"the body is larger than {_MAX_BODY} bytes")
        if not message.get("more_body"):
            return b"".join(parts)


def _head(status: int, content_type: bytes, length: int | None = None) -> dict[str, object]:
    headers = [(b"content-type", content_type)]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _respond(send: Callable[[dict[str, object]], Awaitable[None]], status: int, body: bytes) -> None:
    await send(_head(status, b"application/json", len(body)))
    await send({"type": "http.response.body", "body": body})


def _json(status: int, body: bytes) -> Response:
    return Response(body, status, media_type="application/json")


def _error(failure: ApiError) -> Response:
    return _json(failure.status, failure.body())


