"""One request through the engine: submit, bring its KV where it is elsewhere, turn tokens into text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from pdctl.engine.front.core_link import CoreLink, RequestEvent
from pdctl.engine.front.leases import LeaseDesk
from pdctl.engine.front.migrate import KvLost, Migrator
from pdctl.engine.front.openai import GenerationRequest
from pdctl.engine.front.text import OutputText, TextCodec
from pdctl.engine.messages import Failed, Held, Submit, Token
from pdctl.lean_http import Unreachable
from pdctl.openai_api import ApiError
from pdctl.wire import HandOver, token_digest

# Enough context for the detokenizer to join a first output token to the prompt's end.
_PROMPT_TAIL = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added: token ids, the text that became safe to show, and why the output ended, if it did."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    hand_over: HandOver | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this engine is to its peers."""

    name: str
    epoch: str
    host: str
    port: int
    lease_s: float


class Generator:
    """Runs requests on one engine."""

    def __init__(
        self, identity: Identity, codec: TextCodec, core: CoreLink, leases: LeaseDesk, migrator: Migrator
    ) -> None:
        self._identity = identity
        self._codec = codec
        self._core = core
        self._leases = leases
        self._migrator = migrator

    async def run(self, request: GenerationRequest) -> AsyncIterator[Piece]:
        """Pieces until one carries a finish_reason or a hand-over. Raises ApiError and KvLost.

        Leaving early, or being cancelled, frees everything the request holds in this engine.
        """
        text = OutputText(self._codec.tokenizer, request.token_ids[-_PROMPT_TAIL:], request.stops)
        for token_id in request.resume:
            text.push(token_id)
        if len(request.resume) >= request.sampling.max_tokens:
            # The engine before this one died between its last token and saying that it was the last.
            await self._let_go(request)
            yield Piece([], text.flush(), "length")
            return
        submit, first = _submission(request)
        if first is not None:
            piece, done = _first_piece(request, text, first)
            if done:
                await self._let_go(request)
                yield piece
                return
        async with self._core.request(submit) as events:
            if request.hand_over is not None:
                deadline = max(60.0, 4 * self._identity.lease_s)
                await self._migrator.bring(submit.request_id, request.hand_over, events, deadline)
            if first is not None:
                yield piece
            async for piece in self._pieces(submit, events, text):
                yield piece

    async def _pieces(
        self, submit: Submit, events: asyncio.Queue[RequestEvent], text: OutputText
    ) -> AsyncIterator[Piece]:
        request_id = submit.request_id
        while True:
            match event := await events.get():
                case Token(_, token_id, finish_reason):
                    shown, stopped = text.push(token_id)
                    if finish_reason is not None:
                        self._core.keep(request_id)
                    if stopped:
                        finish_reason = "stop"
                    elif finish_reason is not None:
                        shown += text.flush()
                    yield Piece([token_id], shown, finish_reason)
                    if finish_reason is not None:
                        return
                case Held():
                    yield self._held(submit, event, text)
                    return
                case Failed(_, reason):
                    self._core.keep(request_id)
                    raise ApiError(400, reason)
                case _:
                    raise AssertionError(f"unexpected {event}")

    def _held(self, submit: Submit, held: Held, text: OutputText) -> Piece:
        request_id = submit.request_id
        shown, stopped = text.push(held.token_id)
        if stopped:
            # Ends here after all; leaving the request's context frees the blocks.
            return Piece([held.token_id], shown, "stop")
        ready = self._core.ready
        assert ready is not None
        lease = self._leases.grant(request_id, len(held.block_ids))
        self._core.keep(request_id)
        me = self._identity
        hand_over = HandOver(
            remote_engine_id=me.name,
            remote_request_id=request_id,
            remote_host=me.host,
            remote_port=me.port,
            remote_block_ids=held.block_ids,
            remote_num_tokens=held.num_tokens,
            token_digest=token_digest(submit.token_ids[: held.num_tokens]),
            lease_id=lease.lease_id,
            epoch=me.epoch,
            lease_s=me.lease_s,
            first_token_id=held.token_id,
            endpoint=ready.endpoint,
        )
        return Piece([held.token_id], shown, None, hand_over)

    async def _let_go(self, request: GenerationRequest) -> None:
        """Release a hand-over that will not be read; if that fails, its deadline does it."""
        if request.hand_over is not None:
            with suppress(Unreachable):
                await self._migrator.call(request.hand_over, "release")


def _submission(request: GenerationRequest) -> tuple[Submit, int | None]:
    """What the core gets, and the first token when it came with the hand-over and the client lacks it.

    Raises KvLost when the hand-over is not for these tokens.
    """
    token_ids = [*request.token_ids, *request.resume]
    hand_over = request.hand_over
    first = None
    if hand_over is not None:
        if len(token_ids) == hand_over.remote_num_tokens:
            first = hand_over.first_token_id
            token_ids.append(first)
        known = token_ids[:-1]
        same = len(known) == hand_over.remote_num_tokens and token_digest(known) == hand_over.token_digest
        if token_ids[-1:] != [hand_over.first_token_id] or not same:
            raise KvLost("the hand-over's KV was computed from other tokens than this request's")
    submit = Submit(
        request_id=request.request_id,
        token_ids=token_ids,
        prompt_len=len(request.token_ids),
        sampling=request.sampling,
        hold=request.hold,
        await_kv=hand_over is not None,
        kv_tokens=hand_over.remote_num_tokens if hand_over else 0,
    )
    return submit, first


def _first_piece(request: GenerationRequest, text: OutputText, token_id: int) -> tuple[Piece, bool]:
    """The piece of the prefill's token, and whether the output ends with it."""
    shown, stopped = text.push(token_id)
    if stopped:
        return Piece([token_id], shown, "stop"), True
    if len(request.resume) + 1 >= request.sampling.max_tokens:
        return Piece([token_id], shown + text.flush(), "length"), True
    return Piece([token_id], shown, None), False
