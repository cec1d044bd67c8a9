"""Where an answer goes: event by event to a streaming client, or gathered into one body."""

from __future__ import annotations

from typing import Protocol

from pdctl import asgi
from pdctl.openai_api import DONE, ApiError, usage
from pdctl.proxy.requests import ClientRequest

Headers = list[tuple[bytes, bytes]]


class Sink(Protocol):
    """Takes an answer's parts in order."""

    started: bool

    async def add(self, text: str, token_ids: list[int], finish_reason: str | None) -> None:
        """The next tokens; the last call has a finish_reason."""
        ...

    async def finish(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The answer is whole."""
        ...

    async def fail(self, failure: ApiError) -> None:
        """The answer cannot be completed."""
        ...


class StreamSink:
    """Server-sent events. `started` once the client has seen anything."""

    def __init__(self, request: ClientRequest, send: asgi.Send, headers: Headers) -> None:
        self.started = False
        self._request = request
        self._send = send
        self._headers = headers

    async def add(self, text: str, token_ids: list[int], finish_reason: str | None) -> None:
        """See Sink.add. A token without text yet is kept from clients that did not ask for ids."""
        first = not self.started
        if first:
            self.started = True
            await asgi.start_stream(self._send, self._headers)
        envelope = self._request.envelope
        if text or first or finish_reason is not None or envelope.with_token_ids:
            await asgi.send_part(self._send, envelope.chunk(text, token_ids, finish_reason, first))

    async def finish(self, prompt_tokens: int, completion_tokens: int) -> None:
        """See Sink.finish."""
        counts = usage(prompt_tokens, completion_tokens)
        tail = self._request.envelope.usage_chunk(counts) if self._request.include_usage else b""
        await asgi.send_part(self._send, tail + DONE, last=True)

    async def fail(self, failure: ApiError) -> None:
        """See Sink.fail. An error event instead of [DONE]: never a stream that just stops."""
        if self.started:
            await asgi.send_part(self._send, b"data: " + failure.body() + b"\n\n", last=True)
        else:
            await asgi.respond_error(self._send, failure, self._headers)


class WholeSink:
    """One JSON body at the end."""

    def __init__(self, request: ClientRequest, send: asgi.Send, headers: Headers) -> None:
        self.started = False
        self._request = request
        self._send = send
        self._headers = headers
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._finish_reason = "length"

    async def add(self, text: str, token_ids: list[int], finish_reason: str | None) -> None:
        """See Sink.add."""
        self._text.append(text)
        self._token_ids += token_ids
        self._finish_reason = finish_reason or self._finish_reason

    async def finish(self, prompt_tokens: int, completion_tokens: int) -> None:
        """See Sink.finish."""
        counts = usage(prompt_tokens, completion_tokens)
        body = self._request.envelope.answer("".join(self._text), self._token_ids, self._finish_reason, counts, {})
        await asgi.respond(self._send, 200, body, self._headers)

    async def fail(self, failure: ApiError) -> None:
        """See Sink.fail."""
        await asgi.respond_error(self._send, failure, self._headers)
