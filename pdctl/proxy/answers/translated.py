"""Answers of APIs that are translated to chat completions: see `pdctl.proxy.translation`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdctl.adapters import Choice
from pdctl.net import asgi
from pdctl.net.openai.api import ApiError, Counts
from pdctl.proxy.answers.sinks import choice_of, timed, timing_comment
from pdctl.proxy.answers.writer import AnswerHeaders, writer
from pdctl.proxy.client.requests import ClientRequest
from pdctl.proxy.takeover.notes import Facts, Progress
from pdctl.proxy.telemetry.timing import Timing
from pdctl.proxy.translation import Api, Translated


class _Translated:
    """What both forms of an answer have in common."""

    def __init__(
        self,
        request: ClientRequest,
        api: Api,
        translated: Translated,
        send: asgi.Send,
        headers: AnswerHeaders,
        timing: Timing | None = None,
    ) -> None:
        assert len(request.legs) == 1, "these APIs have one answer per request"
        self.rendering = translated.rendering(request.envelope)
        self._translated, self._envelope = translated, request.envelope
        self.in_order = translated.in_order
        self._request_id = request.envelope.request_id
        self._api = api
        self._send = send
        self._headers = headers
        self._timing = timing
        self._writer = writer(send)

    async def fail(self, failure: ApiError) -> None:
        """Nothing was sent: send an error in the API's form."""
        body = self._api.error_body(failure, self._request_id)
        await asgi.respond_error(self._send, failure, self._headers, body)


class _TranslatedSink:
    """See Sink. Its API's events differ from the engine's, so nothing is passed on as bytes."""

    passes = False
    event_head = b""
    hides_token_ids = True
    shows_token_ids = False
    takes_whole = False
    prompt_tokens = cached_tokens = completion_tokens = reasoning_tokens = 0

    async def pass_on(self, data: bytes, ids: bytes = b"") -> None:
        """Never called: this sink translates."""
        raise AssertionError(f"{len(data)} bytes were passed to a sink that translates")

    @property
    def part_now(self) -> Callable[[bytes, bytes], bool]:
        """See Sink.part_now. Not possible here, because events are translated."""
        return lambda *_: False


class TranslatedStream(_Translated):
    """Server-sent events of the API."""

    _started = False

    @property
    def sinks(self) -> Sequence[TranslatedStreamSink]:
        """See Answer.sinks."""
        return [TranslatedStreamSink(self)]

    def start_over(self) -> bool:
        """See Sink.start_over."""
        return not self._started

    async def write(self, events: bytes) -> None:
        """Send events, after the head. Waits while the client is slower than the proxy."""
        await self._start()
        if events:
            await self._writer.part(events)

    async def finish(self, wholes: Sequence[bytes | None], counts: Counts) -> None:
        """See Answer.finish. The parts were sent as they came."""
        assert not any(wholes)
        await self._start()
        events = self.rendering.last_events(counts)
        await self._writer.last(events + timing_comment(self._timing))

    async def fail(self, failure: ApiError) -> None:
        """See Answer.fail. After the first event, the error is the last one."""
        if self._started:
            await self._writer.last(self.rendering.error_events(failure))
        else:
            await super().fail(failure)

    def resume(self, legs: Sequence[Progress]) -> None:
        """Another proxy began this answer. It can only fail."""
        self._started = True

    async def _start(self) -> None:
        if not self._started:
            self._started = True
            # The state of these events is not noted: another proxy can only end them with an error.
            facts = Facts(self._request_id, self._envelope.created, 0, is_exact=False)
            await self._writer.start(timed(self._headers, self._timing), facts)


class TranslatedStreamSink(_TranslatedSink):
    """See Sink."""

    def __init__(self, answer: TranslatedStream) -> None:
        self._answer = answer

    async def add(self, choice: Choice, token_ids: list[int]) -> None:
        """See Sink.add."""
        counts = Counts(self.prompt_tokens, 0, self.cached_tokens)
        await self._answer.write(self._answer.rendering.events(choice, counts))

    def start_over(self) -> bool:
        """See Sink.start_over."""
        return self._answer.start_over()


class TranslatedWhole(_Translated):
    """One JSON body at the end."""

    @property
    def sinks(self) -> Sequence[TranslatedWholeSink]:
        """See Answer.sinks."""
        return [TranslatedWholeSink(self)]

    def start_over(self) -> bool:
        """See Sink.start_over. Clients get nothing before the end."""
        self.rendering = self._translated.rendering(self._envelope)
        return True

    async def finish(self, wholes: Sequence[bytes | None], counts: Counts) -> None:
        """See Answer.finish."""
        if wholes[0] is not None:
            self.rendering.gather(choice_of(wholes[0]))
        body = self.rendering.whole(counts)
        await self._writer.whole(body, timed(self._headers, self._timing))


class TranslatedWholeSink(_TranslatedSink):
    """See Sink."""

    def __init__(self, answer: TranslatedWhole) -> None:
        self.takes_whole = not answer.in_order
        self._answer = answer

    async def add(self, choice: Choice, token_ids: list[int]) -> None:
        """See Sink.add."""
        self._answer.rendering.gather(choice)

    def start_over(self) -> bool:
        """See Sink.start_over."""
        return self._answer.start_over()
