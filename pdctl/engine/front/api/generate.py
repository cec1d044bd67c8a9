"""Run one request: submit it, fetch its KV if it is on another engine, turn tokens into text."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from msgspec import structs

from pdctl.engine.front.api.openai import GenerationRequest
from pdctl.engine.front.api.output import Output, Piece, thinking
from pdctl.engine.front.api.parsers import Parsers
from pdctl.engine.front.api.text import TextCodec
from pdctl.engine.front.core_client import CoreClient, Note, RequestEvents
from pdctl.engine.front.handover.moves import Moves
from pdctl.engine.front.handover.offers import OfferDesk, Offering
from pdctl.engine.front.handover.peers import Peers, of_hand_over
from pdctl.engine.front.handover.receiver import KvLost, Receiver
from pdctl.engine.front.prefixes.desk import PrefixDesk
from pdctl.engine.front.routers.transfers import Router
from pdctl.engine.ipc.messages import Failed, Held, Progress, Submit, Thinking, Token, Withdrawn
from pdctl.net.openai.api import ApiError
from pdctl.net.tracing import Attributes
from pdctl.wire import ROLE_CHANGED, HandOver, token_digest

_log = logging.getLogger(__name__)


class Generator:
    """Runs requests on one engine."""

    def __init__(
        self,
        codec: TextCodec,
        parsers: Parsers,
        core: CoreClient,
        desk: OfferDesk,
        peers: Peers,
        receiver: Receiver,
        moves: Moves,
        prefixes: PrefixDesk | None,
    ) -> None:
        """`prefixes`: None: nothing is kept for prompts that begin alike."""
        self._index = prefixes.pieces if prefixes is not None else None
        self._bringer = prefixes.bringer if prefixes is not None else None
        self._identity = desk.identity
        self._codec = codec
        self._parsers = parsers
        self._core = core
        self._desk = desk
        self._peers = peers
        self._receiver = receiver
        self._moves = moves

    def thinking(self, token_ids: list[int]) -> Thinking | None:
        """The reasoning that may come before guided output after this prompt."""
        return thinking(self._codec, self._parsers, token_ids)

    def run(self, request: GenerationRequest) -> AsyncGenerator[Piece]:
        """Pieces until one carries a finish_reason or a hand-over. Raises ApiError and KvLost.

        Leaving the iterator early, or cancelling it, frees everything that the request holds in this engine.
        """
        if request.hand_over is not None and request.router is not Router.OURS:
            return self._run_for_router(request)
        return self._run(request)

    async def _run_for_router(self, request: GenerationRequest) -> AsyncGenerator[Piece]:
        """The same for another project's router, which repeats nothing: a prompt with lost KV is computed here."""
        if not _needs_whole_prompt(request):
            try:
                async with aclosing(self._run(request)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except KvLost as failure:
                # It is raised before the first piece.
                _log.warning("%s: the prompt is computed here: %s", request.request_id, failure)
        self._let_go(request)
        alone = replace(request, request_id=f"{request.request_id}.alone", hand_over=None)
        async with aclosing(self._run(alone)) as pieces:
            async for piece in pieces:
                yield piece

    async def _run(self, request: GenerationRequest) -> AsyncGenerator[Piece]:
        text = Output(self._codec, self._parsers, request)
        if len(request.resume) >= request.sampling.max_tokens:
            # The previous engine died after sending its last token, but before reporting the end.
            self._let_go(request)
            yield text.end()
            return
        submit, first = _submission(request)
        if first is not None:
            piece = _first_piece(request, text, first)
            if piece.finish_reason is not None:
                self._let_go(request)
                yield piece
                return
        await self._look_for(request, submit)
        if request.hand_over is None:
            async with self._core.request(submit) as events:
                async for piece in self._pieces(request, submit, events, text):
                    yield piece
            return
        deadline = max(60.0, 4 * self._identity.lease_s)
        async with self._receiver.decoding(submit, request.hand_over, deadline, request.stages) as (core_id, events):
            if first is not None:
                yield piece
            submit = structs.replace(submit, request_id=core_id)
            brought = time.monotonic()
            _record(request, request.hand_over, brought)
            async for piece in self._pieces(request, submit, events, text):
                if "first_step" not in request.stages:
                    now = time.monotonic()
                    request.stages["first_step"] = now - brought
                    request.span.part("first_step", brought, now)
                yield piece

    async def _look_for(self, request: GenerationRequest, submit: Submit) -> None:
        """Note the prompt's beginning for proxies, and bring what is elsewhere of it."""
        if self._index is not None and request.beginning is not None:
            self._index.note(request.beginning, request.token_ids, request.salt)
        if self._bringer is not None and request.hand_over is None and submit.sampling.prompt_logprobs < 0:
            await self._bringer.bring(submit.token_ids, submit.salt)

    async def _pieces(
        self, request: GenerationRequest, submit: Submit, events: RequestEvents, text: Output
    ) -> AsyncIterator[Piece]:
        offering = Offering(self._desk, submit, request.holder, request.attempt, request.offer_to)
        with self._moves.open(request.attempt if request.stream else "", submit.request_id, offering):
            async for piece in self._offered(request, submit, events, text, offering):
                yield piece

    async def _offered(
        self, request: GenerationRequest, submit: Submit, events: RequestEvents, text: Output, offering: Offering
    ) -> AsyncIterator[Piece]:
        token_ids, last = list(submit.token_ids), False
        try:
            while not last:
                match event := await events.get():
                    case Token():
                        _count_cached(request, event.cached)
                        token_ids.append(event.token_id)
                        piece = self._piece(event, text)
                        last = piece.finish_reason is not None
                        yield piece
                    case Progress():
                        offering.progress(event)
                    case Withdrawn():
                        offering.withdraw()
                    case Held():
                        last = True
                        _count_cached(request, event.cached)
                        yield self._held(submit, token_ids, event, text, offering)
                    case Failed(request_id, reason, elsewhere):
                        self._core.keep(request_id)
                        raise ApiError(409, reason, ROLE_CHANGED) if elsewhere else ApiError(400, reason)
                    case Note():
                        pass  # late results of the reception's calls
                    case _:
                        raise AssertionError(f"unexpected {event}")
        finally:
            offering.withdraw()

    def _piece(self, token: Token, text: Output) -> Piece:
        if token.finish_reason is not None:
            self._core.keep(token.request_id)
        return text.token(token.token_id, token.finish_reason, token.logprobs, token.prompt_logprobs)

    def _held(self, submit: Submit, token_ids: list[int], held: Held, text: Output, offering: Offering) -> Piece:
        assert len(token_ids) == held.num_tokens
        request_id = submit.request_id
        piece = text.token(held.token_id, None, held.logprobs, held.prompt_logprobs)
        if piece.finish_reason is not None:
            # A stop string ends the output; leaving the request's context frees the blocks.
            return piece
        lease = offering.held(held)
        if lease is None:
            # Leaving the request's context frees the blocks.
            raise ApiError(409, "the router has abandoned this request", "gone")
        self._core.keep(request_id)
        me = self._identity
        hand_over = HandOver(
            remote_engine_id=me.name,
            remote_request_id=request_id,
            remote_host=me.host,
            remote_port=me.port,
            remote_block_ids=held.block_ids,
            remote_num_tokens=held.num_tokens,
            token_digest=token_digest(token_ids),
            lease_id=lease.lease_id,
            epoch=me.epoch,
            lease_s=me.lease_s,
            first_token_id=held.token_id,
            endpoint=self._core.endpoint,
            first_logprobs=held.logprobs,
            cached_tokens=held.cached,
            moved=not submit.hold,
        )
        return replace(piece, hand_over=hand_over)

    def _let_go(self, request: GenerationRequest) -> None:
        """Release a hand-over that will not be read."""
        if request.hand_over is not None:
            self._peers.release_later(of_hand_over(request.hand_over))


def _record(request: GenerationRequest, hand_over: HandOver, brought: float) -> None:
    """The parts of a hand-over, as spans. They end now, so an engine that dies later has recorded them."""
    began = brought - request.stages["hand_over"]
    request.span.part("admission", began - request.stages["admission"], began)
    about: Attributes = {
        "pdctl.from": hand_over.remote_engine_id, "pdctl.lease": hand_over.lease_id,
        "pdctl.tokens": hand_over.remote_num_tokens, "pdctl.bytes": int(request.stages["bytes"]),
    }  # fmt: skip
    request.span.part("hand_over", began, brought, about)


def _submission(request: GenerationRequest) -> tuple[Submit, int | None]:
    """The message for the core, and the first token if it came with the hand-over and the client does not have it.

    Raises KvLost if the hand-over is not for these tokens, ApiError if it is malformed.
    """
    token_ids = [*request.token_ids, *request.resume]
    hand_over = request.hand_over
    first, kv_tokens = None, 0
    if hand_over is not None:
        _check_shape(hand_over)
        kv_tokens = hand_over.remote_num_tokens
        if request.router is Router.OURS:
            if len(token_ids) == kv_tokens:
                first = hand_over.first_token_id
                token_ids.append(first)
            _check_tokens(hand_over, token_ids[:-1], token_ids[-1])
        else:
            # As in vLLM, the prompt's last token is computed again and the output's first one sampled here.
            # Other routers change what prefill samples from: vllm-router forbids it the end of the output.
            _check_tokens(hand_over, token_ids, hand_over.first_token_id)
            kv_tokens -= 1
    submit = Submit(
        request_id=request.request_id,
        token_ids=token_ids,
        prompt_len=len(request.token_ids),
        # The prefill engine has already reported the prompt's log probabilities.
        sampling=structs.replace(request.sampling, prompt_logprobs=-1) if hand_over is not None else request.sampling,
        hold=request.hold,
        offer=request.offer_to is not None,
        await_kv=hand_over is not None,
        kv_tokens=kv_tokens,
        # An answer's tokens are not computed in segments.
        kv_segment=0 if hand_over is None or hand_over.moved else hand_over.endpoint.manifest.segment,
        tenant=request.tenant,
        salt=request.salt,
        priority=request.priority,
        ttft_s=request.ttft_s,
        tpot_s=request.tpot_s,
    )
    return submit, first


def _count_cached(request: GenerationRequest, cached: int) -> None:
    """Note how much of the prompt was not computed: of a hand-over, by the prefill engine."""
    found = cached if request.hand_over is None else request.hand_over.cached_tokens
    request.cached = min(found, len(request.token_ids))


def _needs_whole_prompt(request: GenerationRequest) -> bool:
    """Whether a peer's KV is of no use: without its last token nothing is left of it, or all the prompt's log
    probabilities are wanted, of which other routers drop prefill's."""
    assert request.hand_over is not None
    return request.hand_over.remote_num_tokens < 2 or request.sampling.prompt_logprobs >= 0


def _check_tokens(hand_over: HandOver, token_ids: list[int], following: int) -> None:
    """Raise KvLost if the KV is not that of `token_ids`, or the prefill's token is not the one `following` them."""
    same = len(token_ids) == hand_over.remote_num_tokens and token_digest(token_ids) == hand_over.token_digest
    if not same or following != hand_over.first_token_id:
        raise KvLost("the hand-over's KV was computed from other tokens than this request's")


def _check_shape(hand_over: HandOver) -> None:
    """Raise ApiError if the number of blocks does not match the tokens."""
    size, tokens = hand_over.endpoint.manifest.block_size, hand_over.remote_num_tokens
    needed, given = -(-tokens // size), len(hand_over.remote_block_ids)
    if not needed <= given <= needed + 1:
        message = f"kv_transfer_params: {given} blocks for {tokens} tokens of {size} a block"
        raise ApiError(400, message, param="kv_transfer_params")


def _first_piece(request: GenerationRequest, text: Output, token_id: int) -> Piece:
    """The piece of the prefill's token; it has a finish_reason if the output ends with it."""
    assert request.hand_over is not None
    last = len(request.resume) + 1 >= request.sampling.max_tokens
    return text.token(token_id, "length" if last else None, request.hand_over.first_logprobs)
