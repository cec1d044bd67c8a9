"""One client request from admission to its last byte: its legs, its answer, and its entries in metrics and log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from pdctl.adapters import RequestState
from pdctl.net import asgi
from pdctl.net.openai.api import FINGERPRINT, ApiError, Counts, Envelope
from pdctl.net.prefixes.beginnings import Beginning, beginning_of
from pdctl.proxy.answers.sinks import Answer, StreamAnswer, WholeAnswer
from pdctl.proxy.answers.translated import TranslatedStream, TranslatedWhole
from pdctl.proxy.answers.writer import end_stream
from pdctl.proxy.client import requests
from pdctl.proxy.client.connections import BoundedProtocol
from pdctl.proxy.client.keys import ANYONE, API_KEY_HEADER, Keys
from pdctl.proxy.client.requests import ClientRequest
from pdctl.proxy.client.unknown_fields import UnknownFields, header
from pdctl.proxy.request.door import AdmissionDoor
from pdctl.proxy.request.leg import Leg, Shared, order_line, slo_line, tenant_line
from pdctl.proxy.request.relay import Relay
from pdctl.proxy.shares.accounts import Accounts, Claim, LimitReached
from pdctl.proxy.shares.fair_queue import NO_WORK, Waiter, Work
from pdctl.proxy.takeover.notes import Resumed
from pdctl.proxy.takeover.protocol import REPEATED, RESUMED
from pdctl.proxy.telemetry.access_log import AccessLog
from pdctl.proxy.telemetry.recent import RecentRequests
from pdctl.proxy.telemetry.spans import NO_TRACE, Answered, RequestTrace, Tracing
from pdctl.proxy.telemetry.timing import Timing
from pdctl.proxy.translation import CHAT_PATH, Api, Translated
from pdctl.wire import FINGERPRINT_HEADER, ROUTER_HEADER, STARTED_HEADER, TIMING_HEADER

_STARTED, _FINGERPRINT = STARTED_HEADER.encode(), FINGERPRINT_HEADER.encode()

# nginx's status for a client that closed the connection before its answer. It is only used in the log.
_CLIENT_LEFT = 499
_TIMING = TIMING_HEADER.encode()

# Names in lower case. If a name occurs more than once, the last value counts.
RequestHeaders = dict[bytes, bytes]


@dataclass(slots=True)
class Completions:
    """State and settings that all generation requests share."""

    shared: Shared
    door: AdmissionDoor
    keys: Keys
    accounts: Accounts
    log: AccessLog
    model: str
    holder: str
    max_body: int
    unknown: UnknownFields = field(default_factory=UnknownFields)
    tracing: Tracing = field(default_factory=Tracing)
    recent: RecentRequests = field(default_factory=RecentRequests)
    _static: bytes = field(init=False)

    def __post_init__(self) -> None:
        self._static = f"content-type: application/json\r\n{ROUTER_HEADER}: {self.holder}\r\n".encode()

    async def __call__(
        self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send, chat: bool, api: Api | None = None
    ) -> None:
        """Answer one request. `api`: one that is translated to chat completions."""
        headers: RequestHeaders = dict(scope["headers"])
        resumed: Resumed | None = scope.get(RESUMED)
        request_id = asgi.request_id(headers) if resumed is None else resumed.facts.request_id
        job = _Job(self, scope["path"], chat, headers, request_id, api)
        job.resumed, job.is_repeated = resumed, REPEATED in scope
        try:
            if scope["method"] != "POST":
                raise ApiError(405, f"{scope['path']} takes POST", allow="POST")
            job.key = self.keys.name_of(headers.get(b"authorization", b""), headers.get(API_KEY_HEADER, b""))
            request = await job.read(receive)
        except ApiError as failure:
            await job.refuse(send, failure)
            return
        await self._while_connected(job, request, scope, send)

    async def _while_connected(self, job: _Job, request: ClientRequest, scope: asgi.Message, send: asgi.Send) -> None:
        """Run the job; cancel it when the client disconnects."""
        task = asyncio.current_task()
        assert task is not None
        connection: BoundedProtocol = scope["pdctl.connection"]
        connection.on_left = lambda: job.leave(task)
        if not connection.pipeline:
            # A large body paused reading. Without reading, the proxy does not notice that the client disconnected.
            connection.flow.resume_reading()
        try:
            await job.run(request, send)
        except asyncio.CancelledError:
            if not job.left:
                raise
            # This cancellation is ours, not the server's: the client is gone, so there is no answer to send.
            task.uncancel()
            self.shared.metrics.client_left()
        finally:
            connection.on_left = None

    def note_ignored(self, names: list[str]) -> None:
        """Count fields that were left out of a request."""
        for label in self.unknown.labels(names):
            self.shared.metrics.ignored(label)

    def engine_headers(self, job: _Job, envelope: Envelope) -> bytes:
        """Headers for the engines."""
        shared = self.shared
        lines = tenant_line(job.key), slo_line(shared.ttft_s, shared.tpot_s)
        return b"%b%b: %d\r\n%b: %b\r\n%b%b" % (
            self._static, _STARTED, envelope.created, _FINGERPRINT, envelope.fingerprint.encode(), *lines,
        )  # fmt: skip


@dataclass(slots=True)
class _Job:
    """One request. `is_repeated`: another proxy had it, and admitted it; `resumed`: the answer that it began."""

    completions: Completions
    path: str
    chat: bool
    headers: RequestHeaders
    request_id: str
    api: Api | None = None
    translated: Translated | None = None
    key: str = "-"
    left: bool = False
    over: bool = False
    timing: Timing = field(default_factory=Timing)
    trace: RequestTrace = NO_TRACE
    resumed: Resumed | None = None
    is_repeated: bool = False

    async def read(self, receive: asgi.Receive) -> ClientRequest:
        """Read and parse the request. Raises ApiError."""
        limit = self.completions.max_body
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes")
        body = await asgi.read_body(receive, limit, self.headers.get(b"content-encoding", b""))
        completions = self.completions
        completions.shared.quarantine.check(body)
        request = self._parsed(body, self.path) if self.api is None else self._parsed_by(self.api, body)
        request.body = body
        if self.resumed is not None:
            facts = self.resumed.facts
            request.envelope.created = facts.created
            request.envelope.fingerprint = facts.fingerprint or FINGERPRINT
        completions.note_ignored(request.ignored)
        return request

    def _parsed(self, body: bytes, path: str) -> ClientRequest:
        completions = self.completions
        known = completions.shared.pool.known_fields(path)
        seed = None if self.resumed is None else self.resumed.facts.seed
        return requests.parse(
            body, path, self.chat, self.request_id, completions.model, completions.unknown, known, seed
        )

    def _parsed_by(self, api: Api, body: bytes) -> ClientRequest:
        """Parse a request of an API that is translated."""
        self.translated = translated = api.translate(body, self.completions.unknown)
        request = self._parsed(translated.chat_body(), CHAT_PATH)
        request.ignored[:0] = translated.ignored
        return request

    def leave(self, task: asyncio.Task[object]) -> None:
        """The client disconnected: cancel `task`."""
        if not self.over:
            self.left = True
            task.cancel()

    async def refuse(self, send: asgi.Send, failure: ApiError) -> None:
        """Answer with an error before any work has started."""
        self.completions.shared.metrics.failed(failure.status)
        self._note(failure.status, [])
        if self.resumed is not None:
            await end_stream(send, failure)
            return
        body = None if self.api is None else self.api.error_body(failure, self.request_id)
        await asgi.respond_error(send, failure, self._id_headers(), body)

    async def run(self, request: ClientRequest, send: asgi.Send) -> None:
        """Count the request against the limits of its key, and answer it."""
        legs: list[Leg] = []
        try:
            claim = self._claim(request)
        except ApiError as failure:
            await self.refuse(send, failure)
            return
        try:
            await self._answer_to(request, send, legs)
        finally:
            if claim is not None:
                counts = _counts(legs) if legs else Counts()
                # A client that leaves during the prefill has not been told how long its prompt is.
                prompt = counts.prompt or (self._prompt_tokens(request) if legs else 0.0)
                self.completions.accounts.settle(claim, prompt + counts.completion)

    def _claim(self, request: ClientRequest) -> Claim | None:
        """Raises ApiError."""
        if self.key == ANYONE or self.is_repeated:
            # It was counted when it came.
            return None
        completions, admission = self.completions, self.completions.door.admission
        output = request.max_tokens or admission.queue.state(self.key).output
        try:
            return completions.accounts.claim(self.key, self._prompt_tokens(request), output, len(request.legs))
        except LimitReached as failure:
            completions.shared.metrics.shed(failure.limit, self.key)
            raise

    def _prompt_tokens(self, request: ClientRequest) -> float:
        return self.completions.shared.pool.tokens_of(float(request.size))

    async def _answer_to(self, request: ClientRequest, send: asgi.Send, legs: list[Leg]) -> None:
        """Wait for a seat, relay every leg, send the answer."""
        completions, timing = self.completions, self.timing
        answer = self._answer(request, send)
        status, tpot = _CLIENT_LEFT, None
        seat: Waiter | None = None
        self.trace = completions.tracing.begin(self.headers)
        try:
            if self.resumed is not None:
                self._resume(answer, request, self.resumed)
            size = float(request.size) / len(request.legs)
            seat = await completions.door.enter(
                self.key, request.priority, size, request.max_tokens, is_more=self.is_repeated
            )
            timing.admitted_at = time.monotonic()
            legs += self._legs(request, answer)
            if self.resumed is not None:
                for leg, progress in zip(legs, self.resumed.legs, strict=True):
                    leg.resume(progress)
            if len(legs) == 1:
                self._seated(legs[0], seat)
                await Relay(legs[0]).run()
            else:
                first, seat = seat, None  # each leg releases its own seat
                await self._run_all(legs, request, first)
            counts = _counts(legs)
            await answer.finish([leg.whole for leg in legs], counts)
            self.over = True
            status = 200
            if timing.first_token_at:
                tpot = (time.monotonic() - timing.first_token_at) / max(1, counts.completion - 1)
            completions.shared.metrics.finished(timing, counts.prompt, counts.completion)
            completions.shared.pool.answered(float(request.size), counts.prompt)
            if seat is None and tpot is not None:
                completions.door.measured(tpot)
        except ApiError as failure:
            status = failure.status
            completions.shared.metrics.failed(status)
            await answer.fail(failure)
            self.over = True
        finally:
            if seat is not None:
                self._left(legs[0] if legs else None, seat, tpot)
            self._note(status, legs)

    def _resume(self, answer: Answer, request: ClientRequest, resumed: Resumed) -> None:
        """Begin an answer where another proxy left it. Raises ApiError if it cannot go on exactly."""
        assert isinstance(answer, StreamAnswer | TranslatedStream), "only streams have facts"
        answer.resume(resumed.legs)
        if isinstance(answer, TranslatedStream) or not self._is_exact:
            what = "answers of this API" if self.api is not None else "answers of these engines"
            raise ApiError(
                502, f"the proxy was restarted, and {what} cannot be continued by another one", "server_error"
            )
        assert len(request.legs) == len(resumed.legs)
        self.completions.shared.metrics.resumed()

    @property
    def _is_exact(self) -> bool:
        """Whether engines compute the same tokens again."""
        return all(engine.dialect.deterministic for engine in self.completions.shared.pool.engines)

    def _seated(self, leg: Leg, seat: Waiter) -> None:
        """A leg goes to the engines. Between several keys, their order there matters."""
        if self.key != ANYONE:
            leg.headers += order_line(seat.order)
            leg.on_prefilled = partial(self.completions.door.prefilled, seat)

    def _left(self, leg: Leg | None, seat: Waiter, tpot_s: float | None) -> None:
        actual = None if self.key == ANYONE else _work(leg, seat)
        self.completions.door.leave(seat, tpot_s, actual)

    async def _run_all(self, legs: Sequence[Leg], request: ClientRequest, first: Waiter) -> None:
        """Run all legs. The first one has a seat, the others wait for theirs. Raises the first ApiError and cancels
        the other legs."""
        door = self.completions.door
        has_begun = False

        async def run(leg: Leg, seat: Waiter | None) -> None:
            nonlocal has_begun
            if seat is None:
                seat = await door.enter(self.key, request.priority, leg.size, request.max_tokens, is_more=True)
            has_begun = True
            try:
                self._seated(leg, seat)
                await Relay(leg).run()
            finally:
                self._left(leg, seat, None)

        try:
            async with asyncio.TaskGroup() as group:
                for number, leg in enumerate(legs):
                    group.create_task(run(leg, None if number else first))
        except* ApiError as failures:
            raise failures.exceptions[0] from None
        finally:
            if not has_begun:
                # Cancelled before the first leg ran, so it did not release its seat.
                self._left(None, first, None)

    def _id_headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"x-request-id", self.request_id.encode())]
        if self.api is not None and self.api.id_header is not None:
            found.append((self.api.id_header, self.request_id.encode()))
        if self.key != ANYONE:
            found += self.completions.accounts.headers(self.key)
        return found

    def _answer(self, request: ClientRequest, send: asgi.Send) -> Answer:
        extra = self._id_headers()
        if request.ignored:
            extra.append(header(request.ignored))
        timing = self.timing if _TIMING in self.headers else None
        if self.api is not None:
            assert self.translated is not None
            kind = TranslatedStream if request.stream else TranslatedWhole
            return kind(request, self.api, self.translated, send, extra, timing)
        if not request.stream:
            return WholeAnswer(request, send, extra, timing)
        answer = StreamAnswer(request, send, extra, timing)
        if answer.writer.has_journal:
            answer.is_exact = self._is_exact
        return answer

    def _legs(self, request: ClientRequest, answer: Answer) -> list[Leg]:
        shared, model = self.completions.shared, self.completions.model
        shared.budget.request()
        size = float(request.size) / len(request.legs)
        legs = []
        for number, (fields, sink) in enumerate(zip(request.legs, answer.sinks, strict=True)):
            leg = Leg(
                shared,
                RequestState(request.path, request.envelope.chat, fields, counts_each=request.counts_each, model=model),
                sink,
                # Each leg has a different name: engines that use it as a key would treat two legs as one request.
                f"{self.request_id}-{number}" if number else self.request_id,
                self.completions.engine_headers(self, request.envelope),
                size,
                request.max_tokens,
                request.body,
                _beginning(fields, self.key) if shared.pool.wants_prefixes else None,
                Timing(self.timing.received_at, self.timing.admitted_at) if number else self.timing,
            )
            leg.trace = self.trace
            legs.append(leg)
        return legs

    def _note(self, status: int, legs: Sequence[Leg]) -> None:
        completions = self.completions
        recent = completions.recent
        if not (completions.log or recent.is_wanted or completions.tracing) and self.key == ANYONE:
            return
        counts, failures = _counts(legs) if legs else Counts(), sum(leg.failures for leg in legs)
        if self.key != ANYONE:
            completions.shared.metrics.of_key(self.key, status, counts, self.timing)
        if completions.log:
            completions.log.add(self.request_id, self.key, self.path, status, counts, self.timing, failures)
        if recent.is_wanted:
            recent.add(self.request_id, self.path, status, counts, self.timing)
        self.trace.end(Answered(self.request_id, self.path, status, counts, failures), self.timing)


def _counts(legs: Sequence[Leg]) -> Counts:
    """Token counts of all legs. With `n`, a prompt counts once."""
    if len(legs) == 1:
        leg = legs[0]
        output = leg.completion_tokens or len(leg.state.emitted)
        return Counts(leg.prompt_tokens, output, leg.cached_tokens, leg.reasoning_tokens)
    prompts = {id(leg.state.fields.get("prompt")): (leg.prompt_tokens, leg.cached_tokens) for leg in legs}
    prompt, cached = (sum(numbers) for numbers in zip(*prompts.values(), strict=True))
    output = sum(leg.completion_tokens or len(leg.state.emitted) for leg in legs)
    return Counts(prompt, output, cached, sum(leg.reasoning_tokens for leg in legs))


def _work(leg: Leg | None, seat: Waiter) -> Work:
    """What a leg has cost. The prompt's tokens are unknown if it ended before its first token."""
    if leg is None:
        return NO_WORK
    prompt = float(leg.prompt_tokens - leg.cached_tokens) if leg.prompt_tokens else seat.work.prompt
    return Work(prompt, float(leg.completion_tokens or len(leg.state.emitted)))


def _beginning(fields: dict[str, object], key: str) -> Beginning | None:
    """The names of the prompt's pieces: of each key, and each `cache_salt`, others."""
    prompt, salt = fields.get("prompt", fields.get("messages")), fields.get("cache_salt", b"")
    if not isinstance(prompt, msgspec.Raw):
        return None
    salted = key.encode() + b"\0" + (bytes(salt) if isinstance(salt, msgspec.Raw) else b"")
    found = beginning_of(bytes(prompt), salted)
    return found if found.pieces else None
