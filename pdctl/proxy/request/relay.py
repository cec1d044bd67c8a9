"""One leg's life: prefill, first token to the client, hand-over to decode, and on through whatever dies.

The tokens a client has seen are kept. When an engine fails, the request goes on from the next token: prompt and
tokens so far are prefilled again and handed to an engine that lives. Sampling depends on (seed, position) alone, so
the continuation is the one that the client would have got.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass, field

from pdctl.adapters import Call, CannotResume, EngineError, Prefilled, RequestState
from pdctl.net.asgi import new_name
from pdctl.net.http_client import Exchange, Unreachable
from pdctl.net.openai_api import ApiError
from pdctl.proxy.answers.sinks import Sink
from pdctl.proxy.answers.stream import EventReader
from pdctl.proxy.engines.breaker import RetryBudget
from pdctl.proxy.engines.pool import Engine, EnginePool, Ticket
from pdctl.proxy.engines.releases import Releases
from pdctl.proxy.engines.routing import Ask, EnginePair, RoutingPolicy, choose
from pdctl.proxy.request.quarantine import Quarantine, Suspicion
from pdctl.proxy.telemetry.metrics import Metrics
from pdctl.proxy.telemetry.timing import Timing
from pdctl.wire import ATTEMPT_HEADER, TIMING_HEADER

_log = logging.getLogger(__name__)

# Engine failures one request may meet without a new token between them, and in all.
_MAX_FAILURES = 8
_MAX_FAILURES_IN_ALL = 100
# How long a request may meet failures without a new token, seconds.
_NO_PROGRESS_S = 300.0
# Hand-overs one request may lose before one engine computes it alone.
_MAX_LOST = 2
# How long a request waits for an engine to come back, and for a silent engine, seconds.
_WAIT_FOR_ENGINE_S = 60.0
_PREFILL_S = 600.0
_FIRST_TOKEN_S = 300.0
_STALL_S = 120.0
# An answer that takes so many times as long as expected is given up, but not before this, seconds.
_TIMES_EXPECTED = 10.0
_LEAST_PATIENCE_S = 5.0
_LOOK_AT_SUSPECT_S = 0.1
_BACKOFF_S = 0.02
_LONGEST_BACKOFF_S = 1.0
# An unstreamed answer of at most this many tokens is asked for whole: computing it again is cheaper than carrying it
# token by token.
_WHOLE_TOKENS = 128

_ATTEMPT, _TIMING = ATTEMPT_HEADER.encode(), TIMING_HEADER.encode()
# Answers that say "not here, not now" and are worth another engine.
_RETRYABLE = frozenset({409, 429, 500, 502, 503, 504})


@dataclass(slots=True)
class Shared:
    """What all requests of a proxy share."""

    pool: EnginePool
    policy: RoutingPolicy
    metrics: Metrics
    releases: Releases
    quarantine: Quarantine
    ttft_s: float
    tpot_s: float
    wants_prefixes: bool = False
    budget: RetryBudget = field(default_factory=RetryBudget)
    request_number: int = 0


class _Failed(Exception):
    """An engine failed this request in a way that another may not. `blameless`: its KV was lost, nobody broke.

    `inside`: the request was in the engine when it failed.
    """

    def __init__(self, engine: Engine, reason: str, blameless: bool = False, inside: bool = True) -> None:
        super().__init__(reason)
        self.engine = engine
        self.blameless = blameless
        self.inside = inside and not blameless


class Relay:
    """One leg. `state.emitted` are the output token ids the client has (or will be sent with the whole answer).

    `name`: what engines call it; `headers`: ready-made lines for them; `body`: the client's request, by which it is
    known in quarantine; `pieces`: its prompt's prefixes; `whole`: the body of an answer that came in one piece, as
    clients get it.
    """

    # Most requests change none of these: they cost nothing until they do.
    prompt_tokens = 0
    completion_tokens = 0
    whole: bytes | None = None
    failures = 0
    failures_in_all = 0
    lost = 0
    emitted_at_failure = 0
    avoid: frozenset[str] = frozenset()
    finished = False

    def __init__(
        self,
        shared: Shared,
        state: RequestState,
        sink: Sink,
        name: str,
        headers: bytes,
        size: float,
        max_tokens: int | None,
        body: bytes,
        pieces: list[int],
        timing: Timing,
    ) -> None:
        self.shared = shared
        self.state = state
        self.sink = sink
        self.name = name
        self.headers = headers
        self.size = size
        self.max_tokens = max_tokens
        self.body = body
        self.pieces = pieces
        self.timing = timing
        self.suspicion = Suspicion(shared.quarantine)
        self.progress_at = timing.received_at

    async def run(self) -> None:
        """Relay the whole answer. Raises ApiError that says why not."""
        try:
            while not self.finished:
                await self._attempt()
        finally:
            self.suspicion.cleared()
        self.completion_tokens = self.completion_tokens or len(self.state.emitted)

    async def _attempt(self) -> None:
        pair = await self._choose()
        engines = self.shared.pool.by_name
        prefill, decode = engines[pair.prefill], engines[pair.decode]
        self.timing.engines = (pair.prefill, pair.decode)
        if prefill.dialect.resumes_at_text or decode.dialect.resumes_at_text:
            self.state.take_back()
        if self.state.emitted and (end := prefill.dialect.ending(self.state)) is not None:
            await self.sink.add(end, [])
            self.finished = True
            return
        try:
            if pair.is_one or self.lost >= _MAX_LOST or self._one_token_left():
                self.timing.engines = (prefill.name, prefill.name)
                await self._decode(prefill, None)
                return
            hand_over = await self._prefill(prefill, decode)
            if hand_over is not None:
                await self._hand_over(prefill, decode, hand_over)
        except _Failed as failure:
            await self._failed(failure)
        except CannotResume as failure:
            raise ApiError(failure.status, failure.message, failure.kind) from failure

    async def _choose(self) -> EnginePair:
        shared, deadline = self.shared, time.monotonic() + _WAIT_FOR_ENGINE_S
        if not self.avoid and (only := shared.pool.only_pair()) is not None:
            return only
        shared.request_number += 1
        ask = Ask(self.size, shared.request_number, random.random(), shared.ttft_s, shared.tpot_s)  # noqa: S311 - load spreading
        while True:
            pair = choose(shared.policy, shared.pool.views(self.pieces), ask, self.avoid)
            if pair is not None:
                return pair
            left = deadline - time.monotonic()
            if left <= 0:
                raise ApiError(503, "no engine is ready", "service_unavailable", retry_after=5)
            await shared.pool.wait_for_change(min(left, 0.25))

    # -- prefill -------------------------------------------------------------------------------------------

    async def _prefill(self, engine: Engine, decode: Engine) -> bytes | None:
        """The next token, sent on at once; the hand-over, or None when the answer ends with it."""
        call = engine.dialect.prefill_call(self.state, decode.address)
        attempt = new_name()
        started = time.monotonic()
        done = await self._prefilled(engine, call, attempt)
        self._measured(engine, time.monotonic() - started)
        self.prompt_tokens = self.sink.prompt_tokens = done.prompt_tokens or self.prompt_tokens
        if self._in_one_piece and done.hand_over is not None:
            # The decode engine's answer will have this token in it as well; this is when it was there.
            self.timing.token(time.monotonic())
            return done.hand_over
        try:
            await self._emit(done)
        except BaseException:
            self._release(engine, done.hand_over)
            raise
        if done.hand_over is None:
            self.finished, self.timing.engines = True, (engine.name, engine.name)
        return done.hand_over

    async def _prefilled(self, engine: Engine, call: Call, attempt: str) -> Prefilled:
        await self._prove(engine)
        lines = b"%b%b: %b\r\n" % (self._lines(engine), _ATTEMPT, attempt.encode())
        exchange = engine.client.exchange("POST", call.path, lines, call.body)
        done = False
        engine.prompts.begin(self.size, time.monotonic())
        ticket = self._begin(engine, exchange, self._patience(engine, _PREFILL_S))
        self.shared.pool.publish(engine)
        try:
            status = await exchange.head()
            answer = engine.dialect.parse_prefill(status, await exchange.rest(), self.state)
            done = True
            return answer
        except (Unreachable, EngineError) as failure:
            if isinstance(failure, Unreachable):
                self._later(engine, engine.dialect.give_up_call(attempt))
            raise self._classified(engine, failure) from failure
        except asyncio.CancelledError:
            # The answer may be on its way, with a lease that nobody will use.
            self._later(engine, engine.dialect.give_up_call(attempt))
            raise
        finally:
            engine.prompts.end(self.size, time.monotonic(), done)
            self._end(engine, ticket)

    async def _hand_over(self, prefill: Engine, decode: Engine, hand_over: bytes) -> None:
        """Decode with the held KV; whatever happens before its first token, the lease is let go."""
        before = len(self.state.emitted)
        try:
            await self._decode(decode, hand_over, prefill.name)
        except _Failed as failure:
            if failure.blameless:
                decode.handed_over(prefill.name, time.monotonic(), good=False)
            raise
        finally:
            if len(self.state.emitted) == before and not self.finished:
                self._release(prefill, hand_over)
        decode.handed_over(prefill.name, time.monotonic(), good=True)
        self.shared.metrics.handed_over(prefill.name, decode.name, self.timing)

    def _release(self, prefill: Engine, hand_over: bytes | None) -> None:
        if hand_over is not None:
            self._later(prefill, prefill.dialect.release_call(hand_over))

    def _later(self, engine: Engine, call: Call | None) -> None:
        if call is not None:
            self.shared.releases.put(engine, call)

    # -- decode --------------------------------------------------------------------------------------------

    async def _decode(self, engine: Engine, hand_over: bytes | None, prefill: str = "") -> None:
        """Have the rest computed by `engine`, which prefills by itself where there is no hand-over."""
        await self._prove(engine)
        # Without a hand-over the engine computes the prompt as well: that is what its time depends on.
        meter, amount = (engine.streams, 1.0) if hand_over else (engine.prompts, self.size)
        meter.begin(amount, time.monotonic())
        self.shared.pool.publish(engine)
        try:
            call = engine.dialect.decode_call(self.state, hand_over, not self._in_one_piece)
            exchange = engine.client.exchange("POST", call.path, self._lines(engine), call.body)
            ticket = self._begin(engine, exchange, _FIRST_TOKEN_S if hand_over else self._patience(engine, _PREFILL_S))
            try:
                await self._read(engine, exchange, ticket)
            finally:
                self._end(engine, ticket)
        except (Unreachable, EngineError) as failure:
            raise self._classified(engine, failure) from failure
        finally:
            meter.end(amount, time.monotonic(), self.finished)
            self.shared.pool.publish(engine)
        if not self.finished:
            raise _Failed(engine, f"{engine.name} ended its stream early")
        engine.breaker.succeeded()

    async def _read(self, engine: Engine, exchange: Exchange, ticket: Ticket) -> None:
        status = await exchange.head()
        if status != 200:
            # An error's body: the dialect turns it into an EngineError.
            engine.dialect.parse_prefill(status, await exchange.rest(), self.state)
            raise EngineError(status, f"{engine.name} answered with status {status}", "server_error")
        self.timing.engine_says(exchange.header(_TIMING))
        if self._in_one_piece:
            self.whole = await exchange.rest()
            self.prompt_tokens, self.completion_tokens = engine.dialect.parse_whole(self.whole)
            self.timing.token(time.monotonic())
            self.finished = True
            return
        ticket.streaming, ticket.patience_s = True, _STALL_S
        reader = EventReader(engine, self.state, self.sink, self.timing, self.shared.metrics)
        if self.suspicion.holds_turn:
            self._watch(reader, asyncio.get_running_loop())
        try:
            await reader.run(exchange)
        finally:
            reader.settle()
            self.finished = self.finished or reader.finished
            self.prompt_tokens = reader.prompt_tokens or self.prompt_tokens
            self._paced(engine, reader)

    # -- parts ---------------------------------------------------------------------------------------------

    async def _prove(self, engine: Engine) -> None:
        """Raises _Failed for an engine that may have died already, when another has died with this request in it.

        Two that are killed together would else seem to have died of it, one after the other.
        """
        suspicion = self.suspicion
        if suspicion.present and not await self.shared.pool.is_proven(engine, suspicion.failed_at):
            raise _Failed(engine, f"{engine.name} does not answer", inside=False)

    def _lines(self, engine: Engine) -> bytes:
        """Headers of a call to `engine`. Of two requests that clients gave one name some engines make one."""
        name = f"{self.name}-{new_name()}" if engine.dialect.keys_by_request_id else self.name
        return b"%b%bx-request-id: %b\r\n" % (engine.headers, self.headers, name.encode())

    def _watch(self, reader: EventReader, loop: asyncio.AbstractEventLoop) -> None:
        """A suspect that goes on like any other is none: the next one's turn comes before its stream ends."""
        if reader.tokens > 1:
            self.suspicion.cleared()
        elif self.suspicion.holds_turn and not reader.finished:
            loop.call_later(_LOOK_AT_SUSPECT_S, self._watch, reader, loop)

    @property
    def _in_one_piece(self) -> bool:
        """Whether the answer is asked for whole: nobody waits for its parts, and it is short enough to be lost."""
        short = self.max_tokens is not None and self.max_tokens <= _WHOLE_TOKENS
        return short and self.sink.takes_whole and not self.state.emitted

    def _patience(self, engine: Engine, most: float) -> float:
        """How long a prefill may take, seconds, what was there before it included."""
        meter = engine.prompts
        # An inline answer's decode is not in the prompts' speed.
        if not meter.speed or self._in_one_piece:
            return most
        return min(most, max(_LEAST_PATIENCE_S, _TIMES_EXPECTED * meter.pending / meter.speed))

    def _begin(self, engine: Engine, exchange: Exchange, patience_s: float) -> Ticket:
        ticket = Ticket(exchange, patience_s)
        engine.tickets.add(ticket)
        engine.breaker.started(time.monotonic())
        return ticket

    def _end(self, engine: Engine, ticket: Ticket) -> None:
        engine.tickets.discard(ticket)
        engine.breaker.abandoned()
        ticket.exchange.close()
        self.shared.pool.publish(engine)

    def _measured(self, engine: Engine, seconds: float) -> None:
        engine.prefill_s.add(seconds)
        engine.breaker.succeeded()
        self.timing.prefilled(time.monotonic())
        if self.pieces:
            engine.prefixes.add(self.pieces)

    def _paced(self, engine: Engine, reader: EventReader) -> None:
        if reader.tokens > 1:
            engine.token_s.add(reader.seconds / (reader.tokens - 1))

    async def _emit(self, done: Prefilled) -> None:
        self.timing.token(time.monotonic())
        # Counted before it is sent: a token that may have reached the client is never sent again.
        self.state.emitted += done.token_ids
        if done.choice:
            await self.sink.add(done.choice, done.token_ids)

    async def _failed(self, failure: _Failed) -> None:
        """Decide whether to go on elsewhere. Raises ApiError when enough has failed."""
        engine = failure.engine
        # One token is prefill's: a request that kills every decode engine gets no further.
        if len(self.state.emitted) > self.emitted_at_failure + 1:
            self.failures = 0
            self.progress_at = time.monotonic()
            self.suspicion.cleared()
        self.emitted_at_failure = len(self.state.emitted)
        self.failures += failure.inside
        self.failures_in_all += 1
        self.lost += failure.blameless
        if failure.inside:
            self.suspicion.failed(engine)
        self.avoid = frozenset() if failure.blameless else frozenset({engine.name})
        self.shared.metrics.failed_over(engine.name)
        _log.info("a request goes on after %d tokens: %s", len(self.state.emitted), failure)
        late = time.monotonic() - self.progress_at > _NO_PROGRESS_S
        if late or self.failures >= _MAX_FAILURES or self.failures_in_all >= _MAX_FAILURES_IN_ALL:
            message = f"the request failed {self.failures_in_all} times, last on {engine.name}: {failure}"
            raise ApiError(502, message, "server_error")
        backoff = min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2 ** min(self.failures + 1, 10)) * random.random()  # noqa: S311 - jitter
        await asyncio.sleep(backoff + self.shared.budget.wait_s(time.monotonic()))
        await self.suspicion.judge(self.body)

    def _classified(self, engine: Engine, failure: Unreachable | EngineError) -> Exception:
        """What a failed call means: try elsewhere, or tell the client."""
        now = time.monotonic()
        if isinstance(failure, Unreachable):
            self.shared.pool.suspect(engine)
            engine.breaker.failed(now)
            engine.prefill_s.failed()
            engine.token_s.failed()
            return _Failed(engine, str(failure), inside=failure.begun)
        if failure.status in _RETRYABLE and not isinstance(failure, CannotResume):
            if not failure.kv_lost:
                engine.breaker.failed(now)
                engine.token_s.failed()
            return _Failed(engine, failure.message, blameless=failure.kv_lost)
        return ApiError(failure.status, failure.message, failure.kind, failure.param)

    def _one_token_left(self) -> bool:
        return self.max_tokens is not None and self.max_tokens - len(self.state.emitted) <= 1
