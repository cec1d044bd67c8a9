"""Sinks of answers: event by event to a streaming client, or gathered into one body.

An answer belongs to one client request; it has one sink per leg.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from pdctl.adapters import UNKNOWN_TOKEN, Choice, shown
from pdctl.net import asgi
from pdctl.net.openai.api import DONE, ApiError, Counts, usage
from pdctl.proxy.answers.gather import Gathered
from pdctl.proxy.answers.writer import AnswerHeaders, writer
from pdctl.proxy.client.requests import ClientRequest
from pdctl.proxy.takeover.notes import Facts, Progress, begun
from pdctl.proxy.takeover.notes import tokens as noted
from pdctl.proxy.telemetry.timing import Timing
from pdctl.wire import TIMING_HEADER

_encode = msgspec.json.Encoder().encode


class Sink(Protocol):
    """Takes one leg's output in order.

    `passes`: accepts an engine's events as bytes, each beginning with `event_head`; `hides_token_ids`: then without
    token ids; `shows_token_ids`: the client gets token ids; `takes_whole`: accepts one complete body instead of parts.
    `prompt_tokens`, and of these `cached_tokens`: if known; `completion_tokens`: so far, if the engine tells their
    number but not their ids; `reasoning_tokens`: so far, if the engine tells them with each part.
    """

    passes: bool
    event_head: bytes
    hides_token_ids: bool
    shows_token_ids: bool
    takes_whole: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int

    async def add(self, choice: Choice, token_ids: list[int]) -> None:
        """Take the next part; the last one has a finish_reason."""
        ...

    async def pass_on(self, data: bytes, ids: bytes = b"") -> None:
        """Take complete events as bytes; `ids`: their token ids, as text."""
        ...

    def start_over(self) -> bool:
        """Forget the parts so far. Returns False if the client may have some of them."""
        ...

    @property
    def part_now(self) -> Callable[[bytes, bytes], bool]:
        """A function that sends more of a started stream without waiting, given its token ids as text, too; it returns
        False if it sent nothing."""
        ...


class Answer(Protocol):
    """The answer to one client request."""

    @property
    def sinks(self) -> Sequence[Sink]:
        """One sink per leg."""
        ...

    async def finish(self, wholes: Sequence[bytes | None], counts: Counts) -> None:
        """Every leg is complete. `wholes`: bodies of legs that an engine answered in one piece."""
        ...

    async def fail(self, failure: ApiError) -> None:
        """The answer cannot be completed: send an error."""
        ...


class StreamAnswer:
    """Server-sent events. `started`: the client has received something; `is_exact`: its engines would compute the same
    again."""

    def __init__(
        self, request: ClientRequest, send: asgi.Send, headers: AnswerHeaders, timing: Timing | None = None
    ) -> None:
        self.started = False
        self.is_exact = True
        self.request = request
        self.headers = headers
        self._send = send
        self.writer = writer(send)
        self._timing = timing
        self.sinks: list[StreamSink] = [
            StreamSink(self, index, alone=len(request.legs) == 1) for index in range(len(request.legs))
        ]

    async def write(self, data: bytes, notes: bytes = b"") -> None:
        """Send events, after the head. Waits while the client is slower than the proxy."""
        if not self.started:
            self.started = True
            request = self.request
            facts = Facts(
                request.envelope.request_id, request.envelope.created, request.seed, len(request.legs),
                fingerprint=request.envelope.fingerprint, is_exact=self.is_exact,
            )  # fmt: skip
            await self.writer.start(timed(self.headers, self._timing), facts)
        await self.writer.part(data, notes)

    def resume(self, legs: Sequence[Progress]) -> None:
        """Go on with an answer that another proxy began."""
        self.started = True
        for sink, progress in zip(self.sinks, legs, strict=True):
            sink.resume(progress)

    async def finish(self, wholes: Sequence[bytes | None], counts: Counts) -> None:
        """Every leg is complete; its parts were sent as they came. Timing that was unknown at the head is sent as a
        comment."""
        assert not any(wholes)
        tail = self.request.envelope.usage_chunk(usage(counts)) if self.request.include_usage else b""
        await self.writer.last(tail + timing_comment(self._timing) + DONE)

    async def fail(self, failure: ApiError) -> None:
        """The answer cannot be completed: send an error event instead of [DONE], never a stream that just stops."""
        if self.started:
            await self.writer.last(b"data: " + failure.body() + b"\n\n")
        else:
            await asgi.respond_error(self._send, failure, self.headers)


class StreamSink:
    """See Sink. One choice of a stream."""

    takes_whole = False

    def __init__(self, answer: StreamAnswer, index: int, alone: bool) -> None:
        envelope = answer.request.envelope
        self._counts_each = answer.request.counts_each
        self.passes = alone and not self._counts_each
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._tokens = 0
        self.event_head = envelope.event_head()
        self.hides_token_ids = not envelope.with_token_ids
        self.shows_token_ids = envelope.with_token_ids
        self._answer = answer
        self._index = index
        self._alone = alone
        self._envelope = envelope
        self._first = True

    def resume(self, progress: Progress) -> None:
        """Go on after the parts that another proxy sent."""
        self._first = not progress.begun
        self._tokens = len(progress.token_ids)
        self.prompt_tokens, self.cached_tokens = progress.prompt_tokens, progress.cached_tokens

    async def add(self, choice: Choice, token_ids: list[int]) -> None:
        """See Sink.add."""
        notes = b""
        if self._answer.writer.has_journal:
            notes = self._begun() + noted(self._index, self._alone, token_ids, is_end(choice))
        if self._first:
            self._first = False
            choice = _with_role(choice)
        self._tokens += len(token_ids)
        tokens = self._tokens or self.completion_tokens
        so_far = Counts(self.prompt_tokens, tokens, self.cached_tokens, self.reasoning_tokens)
        counts = usage(so_far) if self._counts_each else None
        token_ids = _known(token_ids) if self.shows_token_ids else token_ids
        await self._answer.write(self._envelope.event(self._index, choice, token_ids, counts), notes)

    async def pass_on(self, data: bytes, ids: bytes = b"") -> None:
        """See Sink.pass_on."""
        notes = self._begun() + (ids + b"," if ids else b"")
        self._first = False
        await self._answer.write(data, notes)

    def _begun(self) -> bytes:
        return begun(self._index, self._alone, self.prompt_tokens, self.cached_tokens) if self._first else b""

    def start_over(self) -> bool:
        """See Sink.start_over."""
        return self._first

    @property
    def part_now(self) -> Callable[[bytes, bytes], bool]:
        """See Sink.part_now."""
        return self._answer.writer.part_now


class WholeAnswer:
    """One JSON body at the end."""

    started = False

    def __init__(
        self, request: ClientRequest, send: asgi.Send, headers: AnswerHeaders, timing: Timing | None = None
    ) -> None:
        self.request = request
        self.headers = headers
        self._send = send
        self._timing = timing
        self.sinks: list[WholeSink] = [WholeSink(request) for _ in request.legs]

    async def finish(self, wholes: Sequence[bytes | None], counts: Counts) -> None:
        """Every leg is complete, as an engine's body or as gathered by its sink."""
        if len(wholes) == 1 and wholes[0] is not None:
            body = wholes[0]
        else:
            choices = [
                choice_of(whole) if whole is not None else sink.gathered.choice()
                for whole, sink in zip(wholes, self.sinks, strict=True)
            ]
            body = self.request.envelope.body(choices, usage(counts))
        await writer(self._send).whole(body, timed(self.headers, self._timing))

    async def fail(self, failure: ApiError) -> None:
        """The answer cannot be completed: send an error."""
        await asgi.respond_error(self._send, failure, self.headers)


class WholeSink:
    """See Sink. Gathers one choice."""

    passes = False
    event_head = b""
    hides_token_ids = False

    def __init__(self, request: ClientRequest) -> None:
        # The prompt's log probabilities come from the prefill engine and are not in the decode engine's body.
        self.takes_whole = not request.envelope.with_token_ids and not request.wants_prompt_logprobs
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.shows_token_ids = request.envelope.with_token_ids
        self._envelope = request.envelope
        self._gathered: Gathered | None = None

    @property
    def gathered(self) -> Gathered:
        """The parts so far; created with the first part."""
        if self._gathered is None:
            self._gathered = Gathered(self._envelope.chat, self._envelope.with_token_ids)
        return self._gathered

    async def add(self, choice: Choice, token_ids: list[int]) -> None:
        """See Sink.add."""
        self.gathered.add(choice, _known(token_ids) if self.shows_token_ids else token_ids)

    async def pass_on(self, data: bytes, ids: bytes = b"") -> None:
        """Never called: this sink gathers parts."""
        raise AssertionError(f"{len(data)} bytes were passed to a sink that gathers")

    def start_over(self) -> bool:
        """See Sink.start_over. Clients get nothing before the end."""
        self._gathered = None
        return True

    @property
    def part_now(self) -> Callable[[bytes, bytes], bool]:
        """See Sink.part_now. Not possible here, because parts are gathered."""
        return lambda *_: False


class _Body(msgspec.Struct):
    choices: list[Choice]


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_delta = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def timed(headers: AnswerHeaders, timing: Timing | None) -> AnswerHeaders:
    """The headers of an answer, with the timing so far if the client wants it."""
    return headers if timing is None else [*headers, (TIMING_HEADER.encode(), timing.header().encode())]


def timing_comment(timing: Timing | None) -> bytes:
    """The complete timing as a comment at the end of a stream."""
    return b"" if timing is None else f": {TIMING_HEADER} {timing.header()}\n\n".encode()


def choice_of(whole: bytes) -> Choice:
    """The only choice of an engine's answer in one piece."""
    return shown(_decode_body(whole).choices[0])


def is_end(choice: Choice) -> bool:
    """Whether this is the last part of a choice."""
    return bytes(choice.get("finish_reason", b"null")) != b"null"


def _known(token_ids: list[int]) -> list[int]:
    """Only the tokens that the engine has told."""
    return [token for token in token_ids if token != UNKNOWN_TOKEN] if UNKNOWN_TOKEN in token_ids else token_ids


def _with_role(choice: Choice) -> Choice:
    """Add the role, which OpenAI sends in the first event of a chat."""
    if "delta" not in choice:
        return choice
    delta = {"role": msgspec.Raw(b'"assistant"'), **_decode_delta(choice["delta"])}
    return {**choice, "delta": msgspec.Raw(_encode(delta))}
