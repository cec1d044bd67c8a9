"""HTTP surface of an engine: OpenAI endpoints, leases and state for peers, health and metrics for everyone."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from uuid import uuid4

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pdctl import asgi
from pdctl.engine.front import openai
from pdctl.engine.front.core_link import CoreLink
from pdctl.engine.front.generate import Generator
from pdctl.engine.front.leases import LeaseDesk
from pdctl.engine.front.metrics import render_metrics
from pdctl.engine.front.migrate import KvLost, Migrator
from pdctl.engine.front.openai import GenerationRequest
from pdctl.engine.front.text import NoChatTemplate, TextCodec
from pdctl.engine.options import EngineOptions
from pdctl.openai_api import DONE, ApiError, Envelope, usage
from pdctl.wire import STARTED_HEADER, EngineState, HandOver, HolderCall, LeaseCall, RenewCall


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
            raise ApiError(
                404,
                f"the model {parsed.model!r} does not exist; this engine serves {served!r}",
                param="model",
            )
        token_ids = self._prompt_ids(parsed, ready.vocab_size, self._clock(headers))
        hold, hand_over = self._internal_fields(parsed, headers)
        request_id = asgi.request_id(headers)
        return GenerationRequest(
            # The same client request may reach one engine twice, so the id inside is its own.
            request_id=f"{request_id}.{uuid4().hex[:8]}",
            envelope=Envelope(request_id, chat, served, bool(parsed.return_token_ids)),
            token_ids=token_ids,
            sampling=openai.sampling_of(parsed, len(token_ids), ready.max_model_len),
            stops=openai.stop_strings(parsed),
            stream=bool(parsed.stream) and not hold,
            include_usage=bool(parsed.stream_options and parsed.stream_options.include_usage),
            resume=parsed.resume_token_ids or [],
            hold=hold,
            hand_over=hand_over,
        )

    def _clock(self, headers: dict[str, str]) -> float:
        """When the request began: the proxy says, so that all engines agree."""
        given = headers.get(STARTED_HEADER, "")
        internal = self.is_internal(headers.get("authorization", ""))
        return float(given) if internal and given.isdecimal() else float(int(time.time()))

    def _prompt_ids(self, body: openai.CompletionBody | openai.ChatBody, vocab_size: int, at: float) -> list[int]:
        try:
            ids = self._encode(body, at)
        except (NoChatTemplate, ValueError) as failure:
            raise ApiError(400, str(failure), param="messages") from None
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ApiError(400, f"prompt token ids must be from 0 to {vocab_size - 1}", param="prompt")
        return ids

    def _encode(self, body: openai.CompletionBody | openai.ChatBody, at: float) -> list[int]:
        if isinstance(body, openai.ChatBody):
            return self.codec.encode_chat(body.messages, at)
        prompt = body.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            return self._encode(msgspec.structs.replace(body, prompt=prompt[0]), at)
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
                "hand_over_seconds": round(self.migrator.hand_over_seconds_total, 6),
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
        headers = asgi.header_dict(scope["headers"])
        try:
            request = self._service.accept(await asgi.read_body(receive), self._chat, headers)
        except ApiError as failure:
            await asgi.respond_error(send, failure)
            return
        answer = self._stream if request.stream else self._whole
        await asgi.while_connected(receive, lambda: answer(request, send))

    async def _whole(self, request: GenerationRequest, send: Send) -> None:
        text, token_ids, last = "", [], None
        try:
            async for piece in self._service.generator.run(request):
                text += piece.text
                token_ids += piece.token_ids
                last = piece
        except (ApiError, KvLost) as failure:
            await asgi.respond_error(send, _api_error(failure))
            return
        assert last is not None
        extra: dict[str, object] = {"kv_transfer_params": last.hand_over} if last.hand_over else {}
        counts = _usage(request, len(token_ids))
        await asgi.respond(
            send, 200, request.envelope.answer(text, token_ids, last.finish_reason or "length", counts, extra)
        )

    async def _stream(self, request: GenerationRequest, send: Send) -> None:
        started = False
        count = 0
        try:
            async for piece in self._service.generator.run(request):
                if not started:
                    await asgi.start_stream(send)
                count += len(piece.token_ids)
                event = request.envelope.chunk(piece.text, piece.token_ids, piece.finish_reason, not started)
                started = True
                last = piece.finish_reason is not None
                await asgi.send_part(send, event + (_tail(request, count) if last else b""), last)
        except (ApiError, KvLost) as failure:
            error = _api_error(failure)
            if started:
                await asgi.send_part(send, b"data: " + error.body() + b"\n\n", last=True)
            else:
                await asgi.respond_error(send, error)


def _tail(request: GenerationRequest, count: int) -> bytes:
    """What follows the last event, in the same write."""
    counts = request.envelope.usage_chunk(_usage(request, count)) if request.include_usage else b""
    return counts + DONE


def _usage(request: GenerationRequest, new_tokens: int) -> dict[str, int]:
    """Counts of the whole request, resumed tokens included."""
    return usage(len(request.token_ids), new_tokens + len(request.resume))


def _api_error(failure: ApiError | KvLost) -> ApiError:
    return ApiError(409, str(failure), "kv_lost") if isinstance(failure, KvLost) else failure


def _json(status: int, body: bytes) -> Response:
    return Response(body, status, media_type="application/json")


def _error(failure: ApiError) -> Response:
    return _json(failure.status, failure.body())
