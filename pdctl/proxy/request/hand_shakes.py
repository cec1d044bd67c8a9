"""Calls a pair of engines for one attempt, with the hand-shake of their kind (see HandShake)."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from pdctl.adapters import Attempt, HandShake, Prefilled
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.request.calls import CallFailed, decode, prefill, release
from pdctl.proxy.request.failover import Cause, Failure
from pdctl.proxy.request.leg import Leg

# Part of a lease within which the first token must come.
_LEASE_SHARE = 0.9


class PairCall(NamedTuple):
    """One attempt of a leg with two engines."""

    leg: Leg
    attempt: Attempt
    prefill: Engine
    decode: Engine


async def compute(call: PairCall) -> None:
    """Execute one attempt. Raises CallFailed. Afterwards `call.leg.finished` is true if the answer is complete."""
    hand_shake = call.prefill.dialect.hand_shake
    if hand_shake is HandShake.SEQUENTIAL:
        await _sequential(call)
    elif hand_shake is HandShake.OWNED:
        await _owned(call)
    else:
        await _concurrent(call)


async def _sequential(call: PairCall) -> None:
    valid_until = _lease_end(call)
    hand_over = await _prefilled(call)
    if hand_over is not None:
        await _handed_over(call, hand_over, valid_until)


async def go_on(call: PairCall, hand_over: bytes) -> None:
    """Continue a stream that `call.prefill` has handed over. Raises CallFailed."""
    await _handed_over(call, hand_over, math.inf)


def _lease_end(call: PairCall) -> float:
    """The latest moment at which the first token may come, for a prefill that begins now.

    An engine of a kind that verifies no leases decodes whatever is in the blocks when it reads them late. The lease
    begins with the end of the prefill: only the beginning of the prefill is certain to be earlier.
    """
    if call.decode.dialect.verifies_leases:
        return math.inf
    # Both clocks count seconds, but those of different hosts do not run equally fast.
    return time.monotonic() + _LEASE_SHARE * call.leg.shared.lease_s


async def _owned(call: PairCall) -> None:
    held = _Held(call)
    try:
        held.hand_over = await _prefilled(call)
        if held.hand_over is not None:
            _check_kept(call)
            await _decoded(call, held.hand_over, held.end)
    finally:
        # Decode has read it, or never will.
        held.end()


class _Held:
    """What the prefill engine holds for one attempt, until `end`. Once is enough: decode's first token, or its end."""

    def __init__(self, call: PairCall) -> None:
        self.hand_over: bytes | None = None
        self._call = call
        self._is_open = True
        call.prefill.handing_over += 1

    def end(self) -> None:
        """Release it."""
        if self._is_open:
            self._is_open = False
            self._call.prefill.handing_over -= 1
            if self.hand_over is not None:
                release(self._call.leg, self._call.prefill, self.hand_over)


def _check_kept(call: PairCall) -> None:
    """Raises CallFailed if decode cannot read the KV any more: an engine was down since the pair was chosen."""
    share, room, reason = call.leg.share, call.prefill.room, ""
    if share is not None and room is not None and not room.is_current(share):
        reason = f"{call.prefill.name} was restarted before its KV was read"
    elif call.prefill.name in call.decode.unlinked:
        reason = f"{call.decode.name} is not linked to {call.prefill.name} any more"
    if reason:
        raise CallFailed(call.decode, Failure(call.decode.name, Cause.KV_LOST, reason))


async def _concurrent(call: PairCall) -> None:
    """Call both at once. If decode fails, or prefill fails before decode's first token, the other call is cancelled."""
    try:
        async with asyncio.TaskGroup() as tasks:
            prefilling = tasks.create_task(_prefill_beside(call, call.leg.state.sent))
            await _decoded(call, None, None)
            prefilling.cancel()
    except* CallFailed as failures:
        raise failures.exceptions[0] from None


async def _prefill_beside(call: PairCall, sent: int) -> None:
    try:
        done = await prefill(call.leg, call.prefill, call.attempt)
        _count(call.leg, done)
    except CallFailed:
        # Once decode sends tokens, the KV has arrived.
        if call.leg.state.sent == sent:
            raise


def _count(leg: Leg, done: Prefilled) -> None:
    leg.prompt_tokens = done.prompt_tokens or leg.prompt_tokens
    if not (leg.failures or leg.was_resumed):
        # A later prefill finds tokens of the answer, too.
        leg.cached_tokens = done.cached_tokens


async def _prefilled(call: PairCall) -> bytes | None:
    """Prefill, and send the next token to the client. Returns the hand-over, or None if the answer ends there."""
    leg = call.leg
    done = await prefill(leg, call.prefill, call.attempt)
    _count(leg, done)
    leg.sink.prompt_tokens, leg.sink.cached_tokens = leg.prompt_tokens, leg.cached_tokens
    if leg.in_one_piece and done.hand_over is not None:
        # The decode engine's answer will include this token. Only the time of the first token is recorded here.
        leg.timing.token(time.monotonic())
        return done.hand_over
    try:
        await _emit(leg, done)
    except BaseException:
        release(leg, call.prefill, done.hand_over or done.left)
        raise
    if done.hand_over is None:
        release(leg, call.prefill, done.left)
        leg.finished, leg.timing.engines = True, (call.prefill.name, call.prefill.name)
    return done.hand_over


async def _emit(leg: Leg, done: Prefilled) -> None:
    leg.timing.token(time.monotonic())
    # Counted before sending: a token that may have reached the client must never be sent again.
    leg.state.emitted += done.token_ids
    if done.choice:
        await leg.sink.add(done.choice, done.token_ids)


async def _handed_over(call: PairCall, hand_over: bytes, valid_until: float) -> None:
    """Decode with the held KV. If decode ends without a token, the KV is released at prefill."""
    leg, before = call.leg, len(call.leg.state.emitted)
    try:
        if time.monotonic() > valid_until:
            reason = f"the prefill on {call.prefill.name} took longer than its lease"
            raise CallFailed(call.prefill, Failure(call.prefill.name, Cause.KV_LOST, reason))
        await _decoded(call, hand_over, None, valid_until)
    finally:
        if len(leg.state.emitted) == before and not leg.finished:
            release(leg, call.prefill, hand_over)


async def _decoded(
    call: PairCall,
    hand_over: bytes | None,
    on_first_token: Callable[[], None] | None,
    valid_until: float = math.inf,
) -> None:
    leg, name, began = call.leg, call.prefill.name, time.monotonic()
    try:
        await decode(leg, call.decode, call.attempt, hand_over, call.prefill, on_first_token, valid_until)
    except CallFailed as failed:
        if failed.failure.cause is Cause.KV_LOST:
            call.decode.handed_over(name, began, time.monotonic(), good=False)
        raise
    call.decode.handed_over(name, began, time.monotonic(), good=True)
    leg.shared.metrics.handed_over(name, call.decode.name, leg.timing)
