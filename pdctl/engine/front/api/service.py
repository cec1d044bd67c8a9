"""The HTTP API of an engine: OpenAI endpoints, leases and state for peers, health and metrics."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TypeVar
from uuid import uuid4

import anyio
import anyio.to_thread
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pdctl import __version__
from pdctl.engine.cache import prefix
from pdctl.engine.front.api import guided, openai
from pdctl.engine.front.api.control import Control, Locked
from pdctl.engine.front.api.generate import Generator
from pdctl.engine.front.api.messages import messages_of
from pdctl.engine.front.api.openai import GenerationRequest
from pdctl.engine.front.api.output import Piece, chunk_choice, stream_end, timed, usage_of, whole_choice
from pdctl.engine.front.api.targets import priority_in, targets
from pdctl.engine.front.api.text import NoChatTemplate, TextCodec
from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.handover.receiver import KvLost
from pdctl.engine.front.routers.desk import RouterDesk
from pdctl.engine.front.routers.transfers import Router, Transfer, Transfers
from pdctl.engine.front.spans import EngineSpans
from pdctl.engine.ipc.messages import Ready, Sampling
from pdctl.engine.options import EngineOptions
from pdctl.net import asgi
from pdctl.net.openai.api import FINGERPRINT, ApiError, Envelope, decode_request
from pdctl.net.openai.fields import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from pdctl.net.prefixes.beginnings import from_header
from pdctl.wire import (
    ATTEMPT_HEADER,
    BEGINNING_HEADER,
    FINGERPRINT_HEADER,
    ROLE_EPOCH_HEADER,
    ROUTER_HEADER,
    SLO_HEADER,
    STARTED_HEADER,
    TENANT_HEADER,
)

_T = TypeVar("_T")

# Bodies of this many bytes take several milliseconds to parse and tokenize; limit of such bodies processed at once.
_LARGE_BODY = 65_536
_LARGE_AT_ONCE = 2


class EngineService:
    """The state behind the endpoints."""

    def __init__(
        self,
        options: EngineOptions,
        codec: TextCodec,
        core: CoreClient,
        control: Control,
        generator: Generator,
        transfers: Transfers,
        routers: RouterDesk,
        spans: EngineSpans,
    ) -> None:
        self.options = options
        self.codec = codec
        self.core = core
        self.control = control
        self.generator = generator
        self.transfers = transfers
        self.routers = routers
        self.spans = spans
        self._aside = anyio.CapacityLimiter(_LARGE_AT_ONCE)
        self._created = int(time.time())

    def app(self) -> ASGIApp:
        """The ASGI application."""
        app = self._endpoints()
        return app if self.options.open or not self.control.has_secret else Locked(app, self.control)

    def _endpoints(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/completions", _Generate(self, chat=False), methods=["POST"]),
                Route("/v1/chat/completions", _Generate(self, chat=True), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/version", _version),
                Route("/tokenize", _Small(self, self.tokens_of), methods=["POST"]),
                Route("/detokenize", _Small(self, self.text_of), methods=["POST"]),
                *self.control.routes(),
            ],
            exception_handlers=asgi.OPENAI_ERRORS,
        )

    def accept(self, body: bytes, chat: bool, headers: dict[str, str]) -> GenerationRequest:
        """Check a request and tokenize its prompt. Raises ApiError."""
        ready = self._ready()
        self.control.role.check(headers.get(ROLE_EPOCH_HEADER, ""))
        parsed = openai.parse_body(body, chat)
        served = self.options.served_model_name
        self._check_model(parsed.model)
        began = self._clock(headers)
        token_ids = self._prompt_ids(parsed, ready, began)
        transfer = self._transfer(parsed, headers, ready)
        ours = transfer.router is Router.OURS
        options = parsed.stream_options
        request_id = asgi.request_id({b"x-request-id": headers.get("x-request-id", "").encode()})
        internal = headers if self.control.is_internal(headers.get("authorization", "")) else {}
        splits_reasoning = chat and parsed.separate_reasoning is not False
        sampling = self._sampling(parsed, token_ids, ready, splits_reasoning)
        ttft_s, tpot_s = targets(parsed.slo, headers.get(SLO_HEADER, ""))
        signed = internal.get(FINGERPRINT_HEADER) or FINGERPRINT
        envelope = Envelope(request_id, chat, served, bool(parsed.return_token_ids), int(began), signed)
        request = GenerationRequest(
            # A client request may reach one engine twice, so the internal id is unique.
            request_id=f"{request_id}.{uuid4().hex[:8]}",
            envelope=envelope,
            token_ids=token_ids,
            sampling=sampling,
            stops=openai.stop_strings(parsed),
            stream=bool(parsed.stream) and not transfer.hold,
            include_usage=bool(options and options.include_usage),
            resume=parsed.resume_token_ids or [],
            hold=transfer.hold,
            hand_over=transfer.hand_over,
            include_stop=bool(parsed.include_stop_str_in_output),
            echo=self._echo(parsed, token_ids),
            # As in vLLM: only together with include_usage.
            counts_each=bool(options and options.include_usage and options.continuous_usage_stats),
            shows_prompt_logprobs=parsed.prompt_logprobs is not None,
            offer_to=transfer.offer_to if self.options.chunked else None,
            router=transfer.router,
            holder=headers.get(ROUTER_HEADER, Router.OURS.value) if ours else transfer.router.value,
            attempt=headers.get(ATTEMPT_HEADER, "") if ours else "",
            migration=transfer.migration,
            logprobs=sampling.logprobs,
            salt=prefix.salt_of(internal.get(TENANT_HEADER, ""), parsed.cache_salt),
            priority=priority_in(internal, parsed.priority or 0),
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            tool_calls=guided.tool_format(parsed),
            tenant=internal.get(TENANT_HEADER, ""),
            beginning=from_header(internal.get(BEGINNING_HEADER, "")),
            tools=parsed.tools if isinstance(parsed, ChatBody) else None,
            one_call=isinstance(parsed, ChatBody) and parsed.parallel_tool_calls is False,
            splits_reasoning=splits_reasoning,
            shows_reasoning=parsed.include_reasoning is not False,
        )
        return openai.only_for_kv(request) if request.hold and not ours else request

    def _sampling(
        self, body: CompletionBody | ChatBody, token_ids: list[int], ready: Ready, splits_reasoning: bool
    ) -> Sampling:
        """How its tokens are chosen. Raises ApiError."""
        forbidden = self.codec.forbidden(openai.bad_words(body))
        found = openai.sampling_of(body, len(token_ids), ready.max_model_len, ready.vocab_size, forbidden)
        if splits_reasoning and found.grammar:
            return msgspec.structs.replace(found, thinking=self.generator.thinking(token_ids))
        return found

    def _clock(self, headers: dict[str, str]) -> float:
        """When the request began, from the proxy's header, so that all engines agree."""
        given = headers.get(STARTED_HEADER, "")
        internal = self.control.is_internal(headers.get("authorization", ""))
        return float(given) if internal and given.isdecimal() else float(int(time.time()))

    def _prompt_ids(self, body: CompletionBody | ChatBody, ready: Ready, at: float) -> list[int]:
        name = "messages" if isinstance(body, ChatBody) else "prompt"
        try:
            ids = self._encode(body, at, ready.max_model_len)
        except (NoChatTemplate, ValueError) as failure:
            raise ApiError(400, str(failure), param=name) from None
        if not ids:
            raise ApiError(400, "the prompt is empty", param=name)
        if (kept := body.truncate_prompt_tokens) is not None:
            # As in vLLM: keep the last tokens; -1 for as many as fit into the context.
            if kept == 0:
                message = "truncate_prompt_tokens must be at least 1, or -1"
                raise ApiError(400, message, param="truncate_prompt_tokens")
            ids = ids[-(ready.max_model_len - 1 if kept == -1 else kept) :]
        if min(ids) < 0 or max(ids) >= ready.vocab_size:
            raise ApiError(400, f"prompt token ids must be from 0 to {ready.vocab_size - 1}", param=name)
        return ids

    def _encode(self, body: CompletionBody | ChatBody, at: float, max_tokens: int) -> list[int]:
        if isinstance(body, ChatBody):
            tools = body.tools if body.tool_choice != "none" else None
            messages = messages_of(body.messages)
            going_on = bool(body.continue_final_message)
            return self.codec.encode_chat(messages, at, tools, max_tokens, openai.template_variables(body), going_on)
        prompt = body.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            return self._encode(msgspec.structs.replace(body, prompt=prompt[0]), at, max_tokens)
        if isinstance(prompt, str):
            return self.codec.encode(prompt, max_tokens)
        if isinstance(prompt, list) and all(isinstance(item, int) for item in prompt):
            return [int(item) for item in prompt if isinstance(item, int)]
        raise ApiError(400, "send one prompt per request: a string or a list of token ids", param="prompt")

    def _echo(self, body: CompletionBody | ChatBody, token_ids: list[int]) -> str:
        """The text that the answer begins with, if the client wants it: the prompt, or the message to continue."""
        if not body.echo:
            return ""
        if isinstance(body, ChatBody):
            last = messages_of(body.messages)[-1]
            return str(last.get("content") or "") if last["role"] == "assistant" else ""
        whole = isinstance(body.prompt, str) and body.truncate_prompt_tokens is None
        return str(body.prompt) if whole else self.codec.shown(token_ids)

    def _transfer(self, body: CompletionBody | ChatBody, headers: dict[str, str], ready: Ready) -> Transfer:
        """What goes to another engine or comes from one. Raises ApiError."""
        internal = self.control.is_internal(headers.get("authorization", ""))
        if body.resume_token_ids and not internal:
            raise ApiError(403, "only this service's own processes may send resume_token_ids")
        found = self.transfers.of(body, internal)
        given = [*(body.resume_token_ids or []), *([found.hand_over.first_token_id] if found.hand_over else [])]
        if given and not 0 <= min(given) <= max(given) < ready.vocab_size:
            raise ApiError(400, f"resumed token ids must be from 0 to {ready.vocab_size - 1}", param="resume_token_ids")
        return found

    async def _models(self, _: Request) -> Response:
        card = {"id": self.options.served_model_name, "object": "model", "created": self._created, "owned_by": "pdctl"}
        if self.core.ready:
            card["max_model_len"] = self.core.ready.max_model_len
        body = msgspec.json.encode({"object": "list", "data": [card]})
        return Response(body, media_type="application/json")

    def tokens_of(self, body: bytes) -> dict[str, object]:
        """The answer to /tokenize. Raises ApiError."""
        asked = _decoded(body, TokenizeBody)
        self._check_model(asked.model)
        most = self._ready().max_model_len
        try:
            if asked.messages is not None:
                messages = messages_of(asked.messages)
                variables = openai.template_variables(asked)
                going_on = bool(asked.continue_final_message)
                ids = self.codec.encode_chat(messages, time.time(), asked.tools, most, variables, going_on)
            elif asked.prompt is not None:
                ids = self.codec.encode(asked.prompt, most, special=asked.add_special_tokens is not False)
            else:
                raise ApiError(400, "send a prompt, or messages", param="prompt")
        except (NoChatTemplate, ValueError) as failure:
            raise ApiError(400, str(failure), param="prompt" if asked.messages is None else "messages") from None
        found: dict[str, object] = {"count": len(ids), "max_model_len": most, "tokens": ids}
        if asked.return_token_strs:
            found["token_strs"] = [self.codec.tokenizer.id_to_token(token_id) for token_id in ids]
        return found

    def text_of(self, body: bytes) -> dict[str, object]:
        """The answer to /detokenize. Raises ApiError."""
        asked = _decoded(body, DetokenizeBody)
        self._check_model(asked.model)
        ready = self._ready()
        if len(asked.tokens) > (most := max(ready.max_model_len, _LARGE_BODY)):
            raise ApiError(400, f"{len(asked.tokens)} tokens; at most {most} are allowed", param="tokens")
        if asked.tokens and max(asked.tokens) >= ready.vocab_size:
            raise ApiError(400, f"token ids must be from 0 to {ready.vocab_size - 1}", param="tokens")
        if (unknown := next((one for one in asked.tokens if not self.codec.knows(one)), None)) is not None:
            raise ApiError(400, f"the tokenizer has no token {unknown}", param="tokens")
        return {"prompt": self.codec.decode(asked.tokens)}

    def _ready(self) -> Ready:
        if self.core.ready is None:
            raise ApiError(503, "the model is still loading", "service_unavailable")
        return self.core.ready

    def _check_model(self, model: str | None) -> None:
        served = self.options.served_model_name
        if model not in (None, served):
            raise ApiError(404, f"the model {model!r} does not exist; this engine serves {served!r}", param="model")

    async def aside(self, size: int, work: Callable[[], _T]) -> _T:
        """Run `work` in a thread if the request is large, so that it does not block other requests' tokens."""
        if size < _LARGE_BODY:
            return work()
        return await anyio.to_thread.run_sync(work, limiter=self._aside)


async def _version(_: Request) -> Response:
    return Response(msgspec.json.encode({"version": __version__}), media_type="application/json")


def _decoded(body: bytes, kind: type[_T]) -> _T:
    return decode_request(msgspec.json.Decoder(kind).decode, body)


class _Post(ABC):
    """A raw ASGI endpoint that reads a body. A client that disconnects cancels its request, even while it waits."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = asgi.header_dict(scope["headers"])
        try:
            body = await asgi.read_body(receive, encoding=headers.get("content-encoding", "").encode("latin-1"))
        except ApiError as failure:
            await asgi.respond_error(send, failure)
            return
        await asgi.while_connected(receive, lambda: self._answer(body, headers, send))

    @abstractmethod
    async def _answer(self, body: bytes, headers: dict[str, str], send: Send) -> None: ...


class _Small(_Post):
    """POST /tokenize or /detokenize."""

    def __init__(self, service: EngineService, work: Callable[[bytes], dict[str, object]]) -> None:
        self._service = service
        self._work = work

    async def _answer(self, body: bytes, headers: dict[str, str], send: Send) -> None:
        try:
            found = await self._service.aside(len(body), partial(self._work, body))
        except ApiError as failure:
            await asgi.respond_error(send, failure)
            return
        await asgi.respond(send, 200, msgspec.json.encode(found))


class _Generate(_Post):
    """POST /v1/completions or /v1/chat/completions."""

    def __init__(self, service: EngineService, chat: bool) -> None:
        self._service = service
        self._chat = chat

    async def _answer(self, body: bytes, headers: dict[str, str], send: Send) -> None:
        began = time.monotonic()
        try:
            request = await self._service.aside(len(body), partial(self._service.accept, body, self._chat, headers))
        except (ApiError, RecursionError, ValueError, OverflowError) as failure:
            await self._refuse(failure, body, send)
            return
        if request.migration is not None:
            request.hand_over = await self._service.routers.fetch(request.migration)
        with (
            self._service.control.role.counted(request.hold),
            self._service.spans.answer(request.what, headers, began, len(request.token_ids)) as request.span,
        ):
            await (self._stream if request.stream else self._whole)(request, send)

    async def _refuse(
        self, failure: ApiError | RecursionError | ValueError | OverflowError, body: bytes, send: Send
    ) -> None:
        # The client's request is at fault, so no other engine should retry it.
        known = failure if isinstance(failure, ApiError) else ApiError(400, f"the request cannot be read: {failure}")
        # Our proxy releases what it was granted; other routers know no leases. This comes before the answer, because a
        # router that closes its connection then would cancel it.
        await self._service.routers.let_go(self._service.transfers.carried(body))
        await asgi.respond_error(send, known)

    async def _whole(self, request: GenerationRequest, send: Send) -> None:
        pieces: list[Piece] = []
        try:
            async for piece in self._service.generator.run(request):
                pieces.append(piece)
        except (ApiError, KvLost) as failure:
            await asgi.respond_error(send, _api_error(request, failure))
            return
        token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
        extra: dict[str, object] = {}
        if request.hold:
            extra = self._service.routers.fields(request.router, pieces[-1].hand_over, token_ids)
        counts = usage_of(request, len(token_ids))
        if request.hold and request.router is Router.OURS:
            # Another engine continues it, so it is sent like the beginning of a stream.
            assert len(pieces) == 1, "a held prefill computes one token"
            choice = chunk_choice(pieces[0], self._chat, first=not request.resume)
        else:
            choice = whole_choice(pieces, self._chat)
        await asgi.respond(send, 200, request.envelope.body([choice], counts, extra, token_ids), timed(request))

    async def _stream(self, request: GenerationRequest, send: Send) -> None:
        started = False
        count = 0
        try:
            async for piece in self._service.generator.run(request):
                if not started:
                    await asgi.start_stream(send, timed(request))
                count += len(piece.token_ids)
                first = not started and not request.resume
                counts = usage_of(request, count) if request.counts_each else None
                event = request.envelope.event(0, chunk_choice(piece, self._chat, first), piece.token_ids, counts)
                started = True
                tail = stream_end(request, piece, count)
                await asgi.send_part(send, event + tail, last=bool(tail))
        except (ApiError, KvLost) as failure:
            error = _api_error(request, failure)
            if started:
                await asgi.send_part(send, b"data: " + error.body() + b"\n\n", last=True)
            else:
                await asgi.respond_error(send, error)


def _api_error(request: GenerationRequest, failure: ApiError | KvLost) -> ApiError:
    request.span.fail(str(failure))
    return ApiError(409, str(failure), "kv_lost") if isinstance(failure, KvLost) else failure
