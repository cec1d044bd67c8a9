"""OpenAI's Responses: a chat's answer as a response, whole or as events."""

from __future__ import annotations

import msgspec

from pdctl.adapters import Choice
from pdctl.net.openai.api import ApiError, Counts, Envelope
from pdctl.proxy.translation.api import Json, event
from pdctl.proxy.translation.parts import Action, Kind, OutputParts, Part, Step

# Chat finish reasons of an answer that is not complete.
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_PREFIX = {Kind.TEXT: "msg", Kind.CALL: "fc", Kind.REASONING: "rs"}
_GROWS = {
    Kind.TEXT: "response.output_text",
    Kind.CALL: "response.function_call_arguments",
    Kind.REASONING: "response.reasoning_text",
}

_encode = msgspec.json.Encoder().encode


class ResponseAnswer:
    """See Rendering. `echo`: the part of the response that repeats the request."""

    def __init__(self, envelope: Envelope, echo: Json) -> None:
        self._envelope = envelope
        self._echo = echo
        self._output = OutputParts(envelope.request_id)
        self._number = 0

    def gather(self, choice: Choice) -> None:
        """See Rendering.gather."""
        self._output.add(choice)

    def events(self, choice: Choice, counts: Counts) -> bytes:
        """See Rendering.events."""
        steps = self._output.add(choice)
        return self._begun() + b"".join(map(self._shown, steps))

    def last_events(self, counts: Counts) -> bytes:
        """See Rendering.last_events."""
        ends = self._begun() + b"".join(map(self._shown, self._output.end()))
        response = self._finished(counts)
        return ends + self._event(f"response.{response['status']}", response=response)

    def error_events(self, failure: ApiError) -> bytes:
        """See Rendering.error_events. Some clients look for the one event, some for the other."""
        code = _error_code(failure.status)
        error = self._event("error", code=code, message=failure.message, param=failure.param)
        response = self._response("failed", error={"code": code, "message": failure.message})
        return error + self._event("response.failed", response=response)

    def whole(self, counts: Counts) -> bytes:
        """See Rendering.whole."""
        self._output.end()
        return _encode(self._finished(counts))

    def _begun(self) -> bytes:
        """The first two events, once."""
        if self._number:
            return b""
        response = self._response("in_progress")
        begins = [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]
        return b"".join(begins)

    def _shown(self, step: Step) -> bytes:
        """The events of a step."""
        part, at = step.part, {"output_index": step.part.number}
        if step.action is Action.BEGIN:
            added = self._event("response.output_item.added", **at, item=self._item(part, "in_progress"))
            return added + self._content("response.content_part.added", part)
        where = {**at, "item_id": self._id(part), **({} if part.kind is Kind.CALL else {"content_index": 0})}
        logprobs: Json = {"logprobs": step.logprobs or []} if part.kind is Kind.TEXT else {}
        if step.action is Action.GROW:
            return self._event(f"{_GROWS[part.kind]}.delta", **where, delta=step.more, **logprobs)
        done = self._event(f"{_GROWS[part.kind]}.done", **where, **_final(part))
        done += self._content("response.content_part.done", part)
        return done + self._event("response.output_item.done", **at, item=self._item(part, _status(part)))

    def _content(self, kind: str, part: Part) -> bytes:
        """The event of an item's content; a call has none."""
        if part.kind is Kind.CALL:
            return b""
        where = {"item_id": self._id(part), "output_index": part.number, "content_index": 0}
        return self._event(kind, **where, part=_content_of(part))

    def _id(self, part: Part) -> str:
        return f"{_PREFIX[part.kind]}_{self._envelope.request_id}_{part.number}"

    def _item(self, part: Part, status: str) -> Json:
        item: Json = {"id": self._id(part), "status": status}
        content = [_content_of(part)] if status != "in_progress" else []
        if part.kind is Kind.CALL:
            return {"type": "function_call", **item, "call_id": part.call_id, "name": part.name, "arguments": part.text}
        if part.kind is Kind.REASONING:
            return {"type": "reasoning", **item, "summary": [], "content": content}
        return {"type": "message", **item, "role": "assistant", "content": content}

    def _finished(self, counts: Counts) -> Json:
        reason = _INCOMPLETE.get(self._output.finish_reason or "")
        status = "completed" if reason is None else "incomplete"
        details = None if reason is None else {"reason": reason}
        output = [self._item(part, _status(part)) for part in self._output.parts]
        return self._response(status, output=output, incomplete_details=details, usage=_usage(counts))

    def _response(self, status: str, **about: object) -> Json:
        envelope = self._envelope
        return {
            "id": f"resp_{envelope.request_id}",
            "object": "response",
            "created_at": envelope.created,
            "status": status,
            "model": envelope.model,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            "background": False,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **self._echo,
            **about,
        }

    def _event(self, kind: str, **body: object) -> bytes:
        found = event(kind, {"sequence_number": self._number, **body})
        self._number += 1
        return found


def _content_of(part: Part) -> Json:
    if part.kind is Kind.REASONING:
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": part.logprobs}


def _final(part: Part) -> Json:
    """The complete content, for the event that ends it."""
    if part.kind is Kind.CALL:
        return {"name": part.name, "arguments": part.text}
    return {"text": part.text, "logprobs": part.logprobs} if part.kind is Kind.TEXT else {"text": part.text}


def _status(part: Part) -> str:
    return "incomplete" if part.cut else "completed"


def _usage(counts: Counts) -> Json:
    details: Json = {"cached_tokens": counts.cached, "cache_write_tokens": 0}
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": details,
        "output_tokens": counts.completion,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.completion,
    }


def _error_code(status: int) -> str:
    """The API's code of an error in a response."""
    if status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if status < 500 else "server_error"
