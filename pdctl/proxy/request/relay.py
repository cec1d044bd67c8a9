"""Relays one leg: prefill, first token to the client, hand-over to decode, and failover when an engine fails.

The proxy keeps the tokens that a client has. When an engine fails, the request continues at the next token: the prompt
and the tokens so far are prefilled again and handed over to another engine. Sampling depends on (seed, position) alone,
so the continuation is the one that the client would have got without the failure. failover.py decides what to do.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time

from pdctl.adapters import Attempt
from pdctl.net.asgi import new_name
from pdctl.net.openai.api import ApiError
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.routing import Ask, EnginePair
from pdctl.proxy.request.calls import CallFailed, decode, release
from pdctl.proxy.request.course import Course
from pdctl.proxy.request.failover import Cause, Failure, GiveUp
from pdctl.proxy.request.hand_shakes import PairCall, compute, go_on
from pdctl.proxy.request.leg import Leg, Move
from pdctl.proxy.request.migration import can_take, target_of
from pdctl.proxy.telemetry.timing import FailedCall

_log = logging.getLogger(__name__)

# Interval at which a waiting request checks for a usable engine, seconds. A change in the pool wakes it earlier.
_LOOK_FOR_ENGINE_S = 0.25


class Relay:
    """Relays one leg until it is complete."""

    def __init__(self, leg: Leg) -> None:
        self.leg = leg
        self._course = Course()

    async def run(self) -> None:
        """Relay the complete answer. Raises ApiError if the request is given up."""
        leg = self.leg
        try:
            while not leg.finished:
                await self._attempt()
        finally:
            leg.suspicion.cleared()
        leg.completion_tokens = leg.completion_tokens or len(leg.state.emitted)

    async def _attempt(self) -> None:
        leg, pair = self.leg, await self._choose()
        engines = leg.shared.pool.by_name
        prefill, decoding = engines[pair.prefill], engines[pair.decode]
        leg.timing.engines = (pair.prefill, pair.decode)
        if leg.state.sent and await self._resumed(prefill, decoding):
            return
        try:
            one = self._course.one_engine(prefill, decoding, leg.has_one_token_left)
            if one is not None:
                leg.timing.engines = (one.name, one.name)
                await decode(leg, one, Attempt(new_name(), one.address, one.address))
            else:
                attempt = Attempt(new_name(), prefill.address, decoding.address)
                leg.must_stream = not decoding.dialect.verifies_leases
                await compute(PairCall(leg, attempt, prefill, decoding))
            while (move := leg.move) is not None:
                leg.move = None
                await self._go_on(move)
        except CallFailed as failed:
            await self._failed(failed)

    async def _go_on(self, move: Move) -> None:
        """Continue a stream at another engine. Raises CallFailed."""
        leg, source, now = self.leg, move.source, time.monotonic()
        pool, leg.timing.moved_at = leg.shared.pool, now
        target = pool.by_name.get(move.target)
        if target is None or not can_take(source, target, now):
            target = target_of(source, pool.engines, now)
        if target is None:
            release(leg, source, move.hand_over)
            message = f"no engine can take over a stream of {source.name}"
            raise CallFailed(source, Failure(source.name, Cause.NOT_REACHED, message))
        leg.timing.engines = (leg.timing.engines[0], target.name)
        attempt = Attempt(new_name(), source.address, target.address)
        await go_on(PairCall(leg, attempt, source, target), move.hand_over)
        leg.shared.metrics.moved(source.name)

    async def _resumed(self, prefill: Engine, decoding: Engine) -> bool:
        """Prepare to continue after the tokens so far. Returns True if only the end was lost, and it was sent now.

        Raises ApiError if the request cannot continue.
        """
        leg = self.leg
        if leg.state.told is not None:
            leg.state.told.restart()
        if prefill.dialect.resumes_at_text or decoding.dialect.resumes_at_text:
            leg.state.take_back()
        if (end := prefill.dialect.ending(leg.state)) is not None:
            await leg.sink.add(end, [])
            leg.finished = True
        elif leg.state.sent and (reason := prefill.dialect.cannot_resume(leg.state)):
            if not leg.sink.start_over():
                raise ApiError(502, reason, "server_error")
            leg.state.start_over()
        return leg.finished

    async def _choose(self) -> EnginePair:
        """The pair; one engine twice if it computes the request inline. Raises ApiError if none is ready in time."""
        leg, shared, course = self.leg, self.leg.shared, self._course
        deadline = time.monotonic() + shared.failover.wait_for_engine_s
        shared.request_number += 1
        ask = Ask(leg.size, shared.request_number, random.random(), shared.ttft_s, shared.tpot_s)  # noqa: S311 - load spreading
        while (pair := course.pair(shared.pool, shared.policy, ask, leg.pieces)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ApiError(503, "no engine is ready", "service_unavailable", retry_after=5)
            await shared.pool.wait_for_change(min(left, _LOOK_FOR_ENGINE_S))
        if not course.may_be_inline(shared.pool, pair):
            return pair
        found = course.inline(shared.pool, pair, ask, leg.pieces)
        shared.metrics.placed(found)
        return EnginePair(found[0], found[0]) if found else pair

    async def _failed(self, failed: CallFailed) -> None:
        """Execute the decision of failover. Raises ApiError if the request is given up."""
        leg, shared = self.leg, self.leg.shared
        sent, now, chance = leg.state.sent, time.monotonic(), random.random()  # noqa: S311 - jitter
        received_at, limits = leg.timing.received_at, shared.failover
        action = self._course.failed(failed.failure, sent, received_at, now, shared.budget, chance, limits)
        assert self._course.tries is not None
        leg.failures = self._course.tries.failures_in_all
        failure = failed.failure
        leg.timing.failed_at(FailedCall(now, failure.engine, leg.timing.engines, sent, failure.reason))
        if failed.failure.cause is not Cause.REFUSED:
            shared.metrics.failed_over(failed.engine.name)
            _log.info("a request failed after %d tokens: %s", len(leg.state.emitted), failed)
        if isinstance(action, GiveUp):
            raise ApiError(action.status, action.message, action.kind, action.param)
        if action.progressed:
            leg.suspicion.cleared()
        if failed.failure.cause is Cause.BROKE:
            leg.suspicion.failed(failed.engine)
        await asyncio.sleep(action.after_s)
        await leg.suspicion.judge(leg.body)
