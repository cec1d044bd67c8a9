"""One request's life: prefill, first token to the client, hand-over to decode, and on through whatever dies.

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
from uuid import uuid4

from pdctl.adapters import Delta, EngineError
from pdctl.lean_http import StreamedResponse, Unreachable, header_lines
from pdctl.openai_api import ApiError
from pdctl.proxy.metrics import Metrics
from pdctl.proxy.pool import Engine, EnginePool
from pdctl.proxy.requests import ClientRequest
from pdctl.proxy.routing import Choice, Policy, choose
from pdctl.proxy.sinks import Sink
from pdctl.wire import ATTEMPT_HEADER, ROUTER_HEADER, STARTED_HEADER, HandOver

_log = logging.getLogger(__name__)

# Engine failures one request may meet without a new token between them, and in all; a request that keeps meeting
# them may be their cause.
_MAX_FAILURES = 6
_MAX_FAILURES_IN_ALL = 30
# Hand-overs one request may lose before one engine computes it alone.
_MAX_LOST = 2
# How long a request waits for an engine to come back, and for a silent engine, seconds.
_WAIT_FOR_ENGINE_S = 60.0
_PREFILL_S = 600.0
_FIRST_TOKEN_S = 300.0
_STALL_S = 120.0
_BACKOFF_S = 0.05
# Releases that may wait for one engine; more are left to their leases' deadlines.
_MAX_RELEASES = 1024

# Answers that say "not here, not now" and are worth another engine.
_RETRYABLE = frozenset({409, 500, 502, 503, 504})


@dataclass(slots=True)
class Shared:
    """What all requests of a proxy share."""

    pool: EnginePool
    policy: Policy
    metrics: Metrics
    secret: str
    holder: str
    releases: asyncio.Queue[tuple[Engine, tuple[str, bytes]]]
    turn: int = 0


class _Failed(Exception):
    """An engine failed this request in a way that another may not."""

    def __init__(self, engine: Engine, reason: str, blameless: bool = False) -> None:
        super().__init__(reason)
        self.engine = engine
        self.blameless = blameless


@dataclass(slots=True)
class Relay:
    """One request. `emitted` are the output token ids the client has (or will be sent with the whole answer)."""

    shared: Shared
    request: ClientRequest
    sink: Sink
    started_at: float = field(default_factory=time.monotonic)
    emitted: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    first_token_at: float = 0.0
    failures: int = 0
    failures_in_all: int = 0
    lost: int = 0
    emitted_at_failure: int = 0
    avoid: set[str] = field(default_factory=set)
    finished: bool = False

    async def run(self) -> None:
        """Relay the whole answer, or an error that says why not."""
        try:
            while not self.finished:
                await self._attempt()
            await self.sink.finish(self.prompt_tokens, len(self.emitted))
            self.shared.metrics.finished(self.first_token_at, self.started_at, len(self.emitted))
        except ApiError as failure:
            self.shared.metrics.failed(failure.status)
            await self.sink.fail(failure)

    async def _attempt(self) -> None:
        pair = await self._choose()
        prefill, decode = self._engine(pair.prefill), self._engine(pair.decode)
        try:
            if pair.is_one or self.lost >= _MAX_LOST or self._one_token_left():
                await self._decode(prefill, None)
                return
            hand_over = await self._prefill(prefill, decode)
            if hand_over is not None:
                await self._hand_over(prefill, decode, hand_over)
        except _Failed as failure:
            await self._failed(failure)

    async def _choose(self) -> Choice:
        deadline = time.monotonic() + _WAIT_FOR_ENGINE_S
        self.shared.turn += 1
        while True:
            views = [engine.view() for engine in self.shared.pool.engines]
            turn, size = self.shared.turn, float(self.request.size)
            pair = choose(self.shared.policy, views, size, turn, frozenset(self.avoid))
            if pair is not None:
                return pair
            left = deadline - time.monotonic()
            if left <= 0:
                raise ApiError(503, "no engine is ready", "service_unavailable", retry_after=5)
            await self.shared.pool.wait_for_change(min(left, 1.0))

    # -- prefill -------------------------------------------------------------------------------------------

    async def _prefill(self, engine: Engine, decode: Engine) -> HandOver | None:
        """The next token, sent on at once; None when the answer ends with it."""
        body = engine.dialect.prefill_body(self.request.fields, self.emitted, decode.address)
        attempt = uuid4().hex
        try:
            async with engine.deadline(_PREFILL_S):
                with engine.prompts.working(float(self.request.size)):
                    path, headers = self.request.path, self._headers() + header_lines({ATTEMPT_HEADER: attempt})
                    answer = await engine.client.request("POST", path, headers, body, _PREFILL_S)
            done = engine.dialect.parse_prefill(answer.status, answer.body, self.request.envelope.chat)
        except EngineError as failure:
            raise self._classified(engine, failure) from failure
        except (Unreachable, TimeoutError) as failure:
            self._later(engine, engine.dialect.give_up_call(attempt))
            raise self._classified(engine, failure) from failure
        except asyncio.CancelledError:
            # The answer may be on its way, with a lease that nobody will use.
            self._later(engine, engine.dialect.give_up_call(attempt))
            raise
        self.prompt_tokens = done.prompt_tokens
        try:
            await self._emit(done.token_ids, done.text, done.finish_reason)
        except BaseException:
            self._release(engine, done.hand_over)
            raise
        self.finished = done.hand_over is None
        return done.hand_over

    async def _hand_over(self, prefill: Engine, decode: Engine, hand_over: HandOver) -> None:
        """Decode with the held KV; whatever happens before its first token, the lease is let go."""
        before = len(self.emitted)
        started = time.monotonic()
        try:
            await self._decode(decode, hand_over)
        finally:
            if len(self.emitted) == before and not self.finished:
                self._release(prefill, hand_over)
        self.shared.metrics.handed_over(prefill.address.name, decode.address.name, time.monotonic() - started)

    def _release(self, prefill: Engine, hand_over: HandOver | None) -> None:
        if hand_over is not None:
            self._later(prefill, prefill.dialect.release_call(hand_over))

    def _later(self, engine: Engine, call: tuple[str, bytes]) -> None:
        """Make a call without waiting for it; works while being cancelled."""
        # A full queue means that hundreds of releases wait on a dead engine: its leases end by deadline.
        if not self.shared.releases.full():
            self.shared.releases.put_nowait((engine, call))

    # -- decode --------------------------------------------------------------------------------------------

    async def _decode(self, engine: Engine, hand_over: HandOver | None) -> None:
        """Stream the rest from `engine`, which prefills by itself where there is no hand-over."""
        body = engine.dialect.decode_body(self.request.fields, self.emitted, hand_over)
        # Without a hand-over the engine computes the prompt as well: that is what its time depends on.
        meter, amount = (engine.streams, 1.0) if hand_over else (engine.prompts, float(self.request.size))
        try:
            with meter.working(amount):
                await self._read_stream(engine, body, _FIRST_TOKEN_S if hand_over else _PREFILL_S)
        except (Unreachable, EngineError, TimeoutError) as failure:
            raise self._classified(engine, failure) from failure
        if not self.finished:
            raise _Failed(engine, f"{engine.address.name} ended its stream early")

    async def _read_stream(self, engine: Engine, body: bytes, first_s: float) -> None:
        async with engine.deadline(first_s):
            stream = await engine.client.stream("POST", self.request.path, self._headers(), body)
        try:
            if stream.status != 200:
                async with engine.deadline(_STALL_S):
                    refusal = await stream.rest()
                engine.dialect.parse_prefill(stream.status, refusal, self.request.envelope.chat)
            await self._events(engine, stream)
        finally:
            stream.close()

    async def _events(self, engine: Engine, stream: StreamedResponse) -> None:
        buffer = b""
        while True:
            async with engine.deadline(_STALL_S):
                data = await stream.read()
            if data is None:
                return
            *events, buffer = (buffer + data).split(b"\n\n")
            for event in events:
                payload = event.removeprefix(b"data: ")
                if payload != b"[DONE]":
                    await self._delta(engine.dialect.parse_event(payload, self.request.envelope.chat))

    async def _delta(self, delta: Delta) -> None:
        if delta.usage is not None:
            self.prompt_tokens = delta.usage[0]
        if delta.token_ids or delta.finish_reason is not None:
            await self._emit(delta.token_ids, delta.text, delta.finish_reason)
            self.finished = self.finished or delta.finish_reason is not None

    # -- parts ---------------------------------------------------------------------------------------------

    async def _emit(self, token_ids: list[int], text: str, finish_reason: str | None) -> None:
        if not self.emitted:
            self.first_token_at = time.monotonic()
        # Counted before it is sent: a token that may have reached the client is never sent again.
        self.emitted += token_ids
        await self.sink.add(text, token_ids, finish_reason)

    async def _failed(self, failure: _Failed) -> None:
        """Decide whether to go on elsewhere. Raises ApiError when enough has failed."""
        name = failure.engine.address.name
        if failure.blameless:
            self.lost += 1
        elif len(self.emitted) > self.emitted_at_failure:
            self.failures = 0
        self.emitted_at_failure = len(self.emitted)
        self.failures += 1
        self.failures_in_all += 1
        self.avoid = set() if failure.blameless else {name}
        self.shared.metrics.failed_over(name)
        request_id, tokens = self.request.envelope.request_id, len(self.emitted)
        _log.info("request %s goes on after %d tokens: %s", request_id, tokens, failure)
        if self.failures >= _MAX_FAILURES or self.failures_in_all >= _MAX_FAILURES_IN_ALL:
            message = f"the request failed {self.failures_in_all} times, last on {name}: {failure}"
            raise ApiError(502, message, "server_error")
        await asyncio.sleep(_BACKOFF_S * 2 ** (self.failures - 1) * random.random())  # noqa: S311 - jitter, no secret

    def _classified(self, engine: Engine, failure: Exception) -> Exception:
        """What a failed call means: try elsewhere, or tell the client."""
        if isinstance(failure, Unreachable):
            self.shared.pool.lost(engine)
            return _Failed(engine, str(failure))
        if isinstance(failure, TimeoutError):
            self.shared.pool.lost(engine)
            return _Failed(engine, f"{engine.address.name} gave no token in time")
        assert isinstance(failure, EngineError)
        if failure.status in _RETRYABLE:
            return _Failed(engine, failure.message, blameless=failure.kv_lost)
        return ApiError(failure.status, failure.message, failure.kind)

    def _one_token_left(self) -> bool:
        limit = self.request.max_tokens
        return limit is not None and limit - len(self.emitted) <= 1

    def _engine(self, name: str) -> Engine:
        return next(engine for engine in self.shared.pool.engines if engine.address.name == name)

    def _headers(self) -> bytes:
        return header_lines(
            {
                "authorization": f"Bearer {self.shared.secret}",
                "content-type": "application/json",
                "x-request-id": self.request.envelope.request_id,
                STARTED_HEADER: str(self.request.envelope.created),
                ROUTER_HEADER: self.shared.holder,
            }
        )


async def release_forever(shared: Shared) -> None:
    """End leases that nobody will use, as relays report them; an engine that does not answer delays only its own."""
    queues: dict[str, asyncio.Queue[tuple[str, bytes]]] = {}
    async with asyncio.TaskGroup() as tasks:
        while True:
            engine, call = await shared.releases.get()
            name = engine.address.name
            if name not in queues:
                queues[name] = asyncio.Queue(_MAX_RELEASES)
                tasks.create_task(_release_at(shared, engine, queues[name]))
            if not queues[name].full():
                queues[name].put_nowait(call)


async def _release_at(shared: Shared, engine: Engine, calls: asyncio.Queue[tuple[str, bytes]]) -> None:
    while True:
        path, body = await calls.get()
        headers = header_lines({"authorization": f"Bearer {shared.secret}", "content-type": "application/json"})
        try:
            await engine.client.request("POST", path, headers, body, timeout_s=5.0)
        except Unreachable:
            # The engine is down, and its leases with it; or the deadline will end them.
            shared.metrics.release_failed()
