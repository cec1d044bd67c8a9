"""The calls of one leg to engines, prefill and decode, with the accounting and cleanup of each.

A call that fails raises CallFailed with the consequence for the request. The engine's statistics are updated here.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from pdctl.adapters import Attempt, Call, CannotResume, EngineError, HandShake, Prefilled
from pdctl.net.asgi import new_name
from pdctl.net.http_client import Exchange, Unreachable
from pdctl.proxy.answers.stream import EventReader
from pdctl.proxy.engines.accounts import AnswerLoad, PromptLoad, unreachable
from pdctl.proxy.engines.engine import Engine, Ticket
from pdctl.proxy.engines.kv_room import NoRoom, Share
from pdctl.proxy.request.failover import Cause, Failure, classify
from pdctl.proxy.request.leg import Leg, Move, Shared
from pdctl.proxy.request.unfinished import Called
from pdctl.proxy.telemetry.spans import EngineCall
from pdctl.wire import ATTEMPT_HEADER, TIMING_HEADER

_ATTEMPT, _TIMING = ATTEMPT_HEADER.encode(), TIMING_HEADER.encode()
# Interval of the checks of a suspect's stream, seconds.
_SUSPECT_LOOK_S = 0.1
# Longest wait for room for a prompt's KV, seconds; then another engine is tried.
_ROOM_S = 20.0


class CallFailed(Exception):
    """A call to `engine` failed."""

    def __init__(self, engine: Engine, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.engine = engine
        self.failure = failure


async def prefill(leg: Leg, engine: Engine, attempt: Attempt) -> Prefilled:
    """Have an engine compute the prompt and keep its KV. Raises CallFailed."""
    await _prove(leg, engine)
    share = await _take_room(leg, engine)
    if engine.dialect.pairing.prefill_must_finish:
        answer = await _prefill_to_the_end(leg, engine, attempt, share)
    else:
        together = engine.dialect.hand_shake is HandShake.CONCURRENT
        answer = await _prefill(leg, engine, attempt, share, _patience_s(leg, engine, together))
    leg.timing.prefilled(time.monotonic())
    if leg.on_prefilled is not None:
        leg.on_prefilled()
    leg.share = share
    return answer


async def _prefill_to_the_end(leg: Leg, engine: Engine, attempt: Attempt, share: Share | None) -> Prefilled:
    """The same, but the call goes on if this is cancelled. Raises CallFailed."""
    patience_s, longest_s = _patience_s(leg, engine), leg.shared.failover.prefill_s

    async def work() -> Called:
        try:
            return await _prefill(leg, engine, attempt, share, longest_s)
        except CallFailed as failed:
            return failed

    def unwanted(answer: Prefilled) -> None:
        release_at(leg.shared, engine, answer.hand_over or answer.left, share)

    try:
        found = await leg.shared.unfinished.call(work(), patience_s, unwanted)
    except TimeoutError:
        raise _failed(leg, engine, Unreachable(f"{engine.name} did not prefill within {patience_s:.0f} s")) from None
    if isinstance(found, Prefilled):
        return found
    raise found


async def _prefill(leg: Leg, engine: Engine, attempt: Attempt, share: Share | None, patience_s: float) -> Prefilled:
    with leg.trace.call(EngineCall("prefill", engine.name, leg.name, leg.state.sent)) as traced:
        return await _traced_prefill(leg, engine, attempt, share, patience_s, traced)


async def _traced_prefill(
    leg: Leg, engine: Engine, attempt: Attempt, share: Share | None, patience_s: float, traced: bytes
) -> Prefilled:
    call = engine.dialect.prefill_call(leg.state, attempt)
    lines = b"%b%b%b: %b\r\n" % (_lines(leg, engine, traced), call.headers, _ATTEMPT, attempt.name.encode())
    exchange = engine.client.exchange("POST", call.path, lines, call.body)
    done, keeps_nothing = False, False
    load = PromptLoad(leg.shared.pool, engine, leg.size, time.monotonic())
    ticket = _begin(leg, engine, exchange, patience_s)
    try:
        status = await exchange.head()
        body = await exchange.rest()
        if status != 200:
            raise engine.dialect.parse_error(status, body)
        answer = engine.dialect.parse_prefill(body, leg.state)
        done = True
    except (Unreachable, EngineError) as failure:
        keeps_nothing = not (failure.begun if isinstance(failure, Unreachable) else failure.status >= 500)
        if isinstance(failure, Unreachable):
            later(leg, engine, engine.dialect.give_up_call(attempt.name))
        raise _failed(leg, engine, failure) from failure
    except asyncio.CancelledError:
        # The answer may be on its way, with a lease that will not be used.
        later(leg, engine, engine.dialect.give_up_call(attempt.name))
        raise
    finally:
        load.end(time.monotonic(), done)
        _end(engine, ticket)
        if share is not None and engine.room is not None and not done:
            (engine.room.give_back if keeps_nothing else engine.room.leak)(share)
    if share is not None and engine.room is not None:
        engine.room.settle(share, answer.prompt_tokens)
    load.answered(time.monotonic(), leg.pieces)
    return answer


async def decode(
    leg: Leg,
    engine: Engine,
    attempt: Attempt,
    hand_over: bytes | None = None,
    kv_from: Engine | None = None,
    on_first_token: Callable[[], None] | None = None,
    valid_until: float = math.inf,
) -> None:
    """Have an engine compute the rest, and send it to the client. Raises CallFailed.

    `kv_from`: the engine that computes the prompt. Without it this one does, and the time depends on the prompt.
    `valid_until` (monotonic): a first token that comes later is discarded, and the KV counts as lost.
    """
    await _prove(leg, engine)
    share = None if kv_from else await _take_room(leg, engine)
    load = AnswerLoad(leg.shared.pool, engine, leg.size, kv_from is None, time.monotonic())
    ticket: Ticket | None = None

    def first_token() -> None:
        load.first_token(time.monotonic(), 0.0 if leg.in_one_piece else leg.timing.handed_over_at)
        if kv_from is None and leg.on_prefilled is not None:
            leg.on_prefilled()
        if on_first_token is not None:
            on_first_token()

    try:
        with leg.trace.call(EngineCall("decode", engine.name, leg.name, leg.state.sent)) as traced:
            call = engine.dialect.decode_call(leg.state, attempt, hand_over, not leg.in_one_piece)
            exchange = engine.client.exchange("POST", call.path, _lines(leg, engine, traced) + call.headers, call.body)
            patience_s = _first_token_s(leg, kv_from) if kv_from else _patience_s(leg, engine)
            ticket = _begin(leg, engine, exchange, patience_s)
            ticket.source, ticket.attempt = attempt.prefill.name if kv_from else "", attempt.name
            try:
                await _read(leg, engine, exchange, ticket, first_token, valid_until)
            finally:
                _end(engine, ticket)
            if not leg.finished and leg.move is None:
                raise CallFailed(engine, Failure(engine.name, Cause.BROKE, f"{engine.name} ended its stream early"))
    except (Unreachable, EngineError) as failure:
        _stay(leg)
        if ticket is not None and ticket.kv_lost:
            raise CallFailed(engine, Failure(engine.name, Cause.KV_LOST, str(failure))) from failure
        if isinstance(failure, Unreachable):
            later(leg, engine, engine.dialect.give_up_decode_call(attempt.name))
        raise _failed(leg, engine, failure) from failure
    except asyncio.CancelledError:
        _stay(leg)
        later(leg, engine, engine.dialect.give_up_decode_call(attempt.name))
        raise
    finally:
        if share is not None and engine.room is not None:
            engine.room.give_back(share)
        load.end(time.monotonic(), leg.finished)
    load.answered(time.monotonic(), leg.pieces)
    leg.shared.pool.learn(kv_from or engine, leg.beginning, leg.state)


def _stay(leg: Leg) -> None:
    """The stream has failed after its hand-over was read: nobody will read its KV."""
    move, leg.move = leg.move, None
    if move is not None:
        release(leg, move.source, move.hand_over)


def release(leg: Leg, prefill_engine: Engine, hand_over: bytes | None) -> None:
    """Release, in the background, a hand-over that no engine will read."""
    share, leg.share = leg.share, None
    release_at(leg.shared, prefill_engine, hand_over, share)


def release_at(shared: Shared, engine: Engine, hand_over: bytes | None, share: Share | None) -> None:
    """The same, with the room that the hand-over has."""
    call = None if hand_over is None else engine.dialect.release_call(hand_over)
    if call is not None:
        shared.releases.put(engine, call, share)
    elif share is not None and engine.room is not None:
        engine.room.leak(share)


def later(leg: Leg, engine: Engine, call: Call | None) -> None:
    """Make a release call to an engine in the background. Works during cancellation."""
    if call is not None:
        leg.shared.releases.put(engine, call)


# -- one answer --------------------------------------------------------------------------------------------


async def _read(
    leg: Leg,
    engine: Engine,
    exchange: Exchange,
    ticket: Ticket,
    on_first_token: Callable[[], None] | None,
    valid_until: float,
) -> None:
    status = await exchange.head()
    if status != 200:
        raise engine.dialect.parse_error(status, await exchange.rest())
    leg.timing.engine_says(exchange.header(_TIMING))
    if leg.in_one_piece:
        leg.whole = await exchange.rest()
        counts = engine.dialect.parse_whole(leg.whole)
        leg.prompt_tokens, leg.completion_tokens, leg.reasoning_tokens = (
            counts.prompt, counts.completion, counts.reasoning
        )  # fmt: skip
        leg.cached_tokens = leg.cached_tokens or counts.cached
        leg.timing.token(time.monotonic())
        leg.finished = True
        if on_first_token is not None:
            on_first_token()
        return
    ticket.streaming, ticket.patience_s = True, leg.shared.failover.stall_s
    reader = EventReader(engine, leg.state, leg.sink, leg.timing, leg.shared.metrics, on_first_token, valid_until)
    if leg.suspicion.holds_turn:
        _watch_suspect(leg, reader, asyncio.get_running_loop())
    try:
        await reader.run(exchange)
    finally:
        reader.settle()
        leg.finished = leg.finished or reader.finished
        if reader.hand_over is not None:
            leg.move = Move(engine, reader.hand_over, ticket.target)
        leg.prompt_tokens = reader.prompt_tokens or leg.prompt_tokens
        leg.cached_tokens = leg.cached_tokens or reader.cached_tokens
        leg.completion_tokens = reader.completion_tokens or leg.completion_tokens
        leg.reasoning_tokens = reader.reasoning_tokens or leg.reasoning_tokens
        if reader.tokens > 1:
            engine.token_s.add(reader.seconds / (reader.tokens - 1))


def _watch_suspect(leg: Leg, reader: EventReader, loop: asyncio.AbstractEventLoop) -> None:
    """Clear a suspect once it streams normally. The next suspect then gets its turn before this stream ends."""
    if reader.tokens > 1:
        leg.suspicion.cleared()
    elif leg.suspicion.holds_turn and not reader.finished:
        loop.call_later(_SUSPECT_LOOK_S, _watch_suspect, leg, reader, loop)


# -- around a call -----------------------------------------------------------------------------------------


async def _prove(leg: Leg, engine: Engine) -> None:
    """Raises CallFailed if another engine died with this request in it and this engine may be dead already, too.

    Without this check, two engines that are killed together would seem to have died of the request one by one.
    """
    suspicion = leg.suspicion
    if suspicion.present and not await leg.shared.pool.is_proven(engine, suspicion.failed_at):
        raise CallFailed(engine, Failure(engine.name, Cause.NOT_REACHED, f"{engine.name} does not answer"))


async def _take_room(leg: Leg, engine: Engine) -> Share | None:
    """Room for the prompt's KV at an engine that does not protect it. Raises CallFailed if there is none in time."""
    if engine.room is None:
        return None
    try:
        share = await engine.room.take(leg.size, _ROOM_S)
    except NoRoom as failure:
        raise CallFailed(engine, Failure(engine.name, Cause.NOT_REACHED, f"{engine.name}: {failure}")) from None
    engine.room.sent += 1
    return share


def _lines(leg: Leg, engine: Engine, traced: bytes) -> bytes:
    """Headers of a call to `engine`. `traced`: those of its trace.

    Some engines treat two requests with the same id as one request.
    """
    name = f"{leg.name}-{new_name()}" if engine.dialect.keys_by_request_id else leg.name
    beginning = leg.beginning_line if engine.dialect.tells_pieces else b""
    return b"%b%b%b%bx-request-id: %b\r\n" % (engine.headers, leg.headers, beginning, traced, name.encode())


def _patience_s(leg: Leg, engine: Engine, together: bool = False) -> float:
    """How long a prefill may take, including the work queued before it. `together`: see FailoverPolicy.patience_s."""
    # The prompts' speed does not include the decode time of an inline answer.
    known = None if leg.in_one_piece and not together else leg.shared.pool.expected_s(engine)
    return leg.shared.failover.patience_s(known, together)


def _first_token_s(leg: Leg, prefill_engine: Engine) -> float:
    """How long decode may take to its first token, or to its whole answer, with KV from another engine."""
    limit = leg.shared.failover.first_token_s
    at_once = prefill_engine.dialect.hand_shake is HandShake.CONCURRENT
    # A whole answer takes as long as its tokens: only a stream shows early that its KV has not come.
    return min(limit, _patience_s(leg, prefill_engine, together=True)) if at_once and not leg.in_one_piece else limit


def _begin(leg: Leg, engine: Engine, exchange: Exchange, patience_s: float) -> Ticket:
    ticket = Ticket(exchange, patience_s)
    engine.tickets.add(ticket)
    engine.breaker.started(time.monotonic())
    return ticket


def _end(engine: Engine, ticket: Ticket) -> None:
    engine.tickets.discard(ticket)
    engine.breaker.abandoned()
    ticket.exchange.close()


def _failed(leg: Leg, engine: Engine, failure: Unreachable | EngineError) -> CallFailed:
    """Record the failure for the engine, and return its consequence for the request."""
    now = time.monotonic()
    if isinstance(failure, Unreachable):
        leg.shared.pool.suspect(engine)
        unreachable(engine, now)
        cause = Cause.BROKE if failure.begun else Cause.NOT_REACHED
        return CallFailed(engine, Failure(engine.name, cause, str(failure)))
    resumable = not isinstance(failure, CannotResume)
    found = classify(engine.name, leg.shared.failover, failure, resumable)
    if found.cause is Cause.BROKE:
        engine.breaker.failed(now)
        engine.token_s.failed()
    return CallFailed(engine, found)
