"""Anthropic's Messages: a chat's answer as a message, whole or as events."""

from __future__ import annotations

import msgspec

from pdctl.adapters import Choice
from pdctl.net.openai.api import ApiError, Counts, Envelope
from pdctl.proxy.translation.api import Json, event
from pdctl.proxy.translation.parts import Action, Kind, OutputParts, Part, Step, arguments_of

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip

_encode = msgspec.json.Encoder().encode


class MessageAnswer:
    """See Rendering. `stops`: the request's stop sequences."""

    def __init__(self, envelope: Envelope, stops: frozenset[str]) -> None:
        self._envelope = envelope
        self._stops = stops
        self._output = OutputParts(envelope.request_id)
        self._has_begun = False

    def gather(self, choice: Choice) -> None:
        """See Rendering.gather."""
        self._output.add(choice)

    def events(self, choice: Choice, counts: Counts) -> bytes:
        """See Rendering.events."""
        steps = self._output.add(choice)
        return self._begun(counts) + b"".join(map(_shown, steps))

    def last_events(self, counts: Counts) -> bytes:
        """See Rendering.last_events."""
        ends = self._begun(counts) + b"".join(map(_shown, self._output.end()))
        ended = event("message_delta", {"delta": self._ending(), "usage": _usage(counts)})
        return ends + ended + event("message_stop", {})

    def error_events(self, failure: ApiError) -> bytes:
        """See Rendering.error_events."""
        return event("error", error_of(failure))

    def whole(self, counts: Counts) -> bytes:
        """See Rendering.whole."""
        self._output.end()
        content = [_block(part) for part in self._output.parts]
        return _encode(self._message(counts, content=content, **self._ending()))

    def _begun(self, counts: Counts) -> bytes:
        """The first events, once."""
        if self._has_begun:
            return b""
        self._has_begun = True
        begins = event("message_start", {"message": self._message(counts._replace(completion=0))})
        return begins + event("ping", {})

    def _message(self, counts: Counts, **about: object) -> Json:
        return {
            "id": f"msg_{self._envelope.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._envelope.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(counts),
            **about,
        }

    def _ending(self) -> Json:
        """Why the message ended."""
        output = self._output
        reason = _STOP_REASONS.get(output.finish_reason or "", "end_turn")
        if output.finish_reason == "stop" and output.stop in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": output.stop}
        if output.finish_reason == "stop" and output.has_calls:
            # vLLM ends a call to a named tool this way.
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": None}


def error_of(failure: ApiError) -> Json:
    """An error in the API's form."""
    kind = _ERRORS.get(failure.status, "invalid_request_error" if failure.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": failure.message}}


def _shown(step: Step) -> bytes:
    """The event of a step."""
    part, at = step.part, {"index": step.part.number}
    if step.action is Action.BEGIN:
        return event("content_block_start", {**at, "content_block": _block(part)})
    if step.action is Action.END:
        return event("content_block_stop", {**at})
    return event("content_block_delta", {**at, "delta": _delta(part, step.more)})


def _delta(part: Part, more: str) -> Json:
    if part.kind is Kind.CALL:
        return {"type": "input_json_delta", "partial_json": more}
    if part.kind is Kind.REASONING:
        return {"type": "thinking_delta", "thinking": more}
    return {"type": "text_delta", "text": more}


def _block(part: Part) -> Json:
    """A content block with what it has so far."""
    if part.kind is Kind.CALL:
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": arguments_of(part)}
    if part.kind is Kind.REASONING:
        # Engines do not sign reasoning.
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    return {"type": "text", "text": part.text}


def _usage(counts: Counts) -> Json:
    # As in Anthropic's API, tokens from the cache are counted apart.
    cached: Json = {"cache_read_input_tokens": counts.cached} if counts.cached else {}
    return {"input_tokens": counts.prompt - counts.cached, "output_tokens": counts.completion, **cached}
