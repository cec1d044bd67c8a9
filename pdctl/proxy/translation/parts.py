"""The output of a chat as a sequence of parts: reasoning, text and tool calls, in the order in which they come.

A stream's events are made from the steps by which the parts grow, a whole answer from the parts themselves. White space
alone does not begin a text: models write line breaks around tool calls. It is shown with the text that follows, or at
the end if there is nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import msgspec

from pdctl.adapters import Choice
from pdctl.net.openai.api import ApiError
from pdctl.proxy.translation.api import Json

_NULL, _NOTHING = msgspec.Raw(b"null"), msgspec.Raw(b"{}")


class Kind(Enum):
    """What a part is. `index` of a tool call counts the calls only."""

    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(slots=True)
class Part:
    """One part. `number`: its place in the answer; `text`: of a call, the arguments as JSON.

    `logprobs`: log probabilities of a text's tokens, as in a chat; `cut`: the output ended within this part.
    """

    kind: Kind
    number: int
    call_id: str = ""
    name: str = ""
    said: list[str] = field(default_factory=list)
    logprobs: list[msgspec.Raw] = field(default_factory=list)
    cut: bool = False

    @property
    def text(self) -> str:
        """The complete text so far."""
        return "".join(self.said)


class Action(Enum):
    """What happens to a part."""

    BEGIN = "begin"
    GROW = "grow"
    END = "end"


class Step(NamedTuple):
    """One step of the output. `part` is still empty with BEGIN. With GROW, `more`: new text; `logprobs`: of its
    tokens."""

    action: Action
    part: Part
    more: str = ""
    logprobs: list[msgspec.Raw] | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function = msgspec.field(default_factory=_Function)


class _Delta(msgspec.Struct):
    content: str | None = None
    # vLLM and SGLang call a model's reasoning by one of these names.
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


class _Logprobs(msgspec.Struct):
    content: list[msgspec.Raw] | None = None


_decode_delta = msgspec.json.Decoder(_Delta).decode
_decode_logprobs = msgspec.json.Decoder(_Logprobs | None).decode
_decode_value = msgspec.json.Decoder().decode


class OutputParts:
    """The parts of one choice. `finish_reason`: the chat's; `stop`: the stop string that ended it, if it is known."""

    def __init__(self, request_id: str) -> None:
        self.parts: list[Part] = []
        self.finish_reason: str | None = None
        self.stop: str | None = None
        self._request_id = request_id
        # White space that does not belong to a part yet, and log probabilities that do not belong to a text yet.
        self._held = ""
        self._logprobs: list[msgspec.Raw] = []
        self._calls: list[int] = []

    @property
    def has_calls(self) -> bool:
        """Whether there is a tool call."""
        return bool(self._calls)

    @property
    def was_cut(self) -> bool:
        """Whether the output ended before its natural end."""
        return self.finish_reason in ("length", "content_filter")

    def add(self, choice: Choice) -> list[Step]:
        """Take the next choice of a stream, or the choice of a whole answer. Raises ApiError 502 if it cannot be read
        as a chat's."""
        try:
            return self._added(choice)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            raise ApiError(502, f"the engine's answer is malformed: {failure}", "bad_upstream") from None

    def end(self) -> list[Step]:
        """The output is complete: end the last part. An output without any part is an empty text."""
        steps = []
        if not self.parts or (self._held and not self._calls):
            steps = self._show(self._held)
        current = self._current
        assert current is not None
        if self._logprobs and current.kind is Kind.TEXT:
            steps += self._grow(current, "")
        current.cut = self.was_cut
        return [*steps, Step(Action.END, current)]

    @property
    def _current(self) -> Part | None:
        return self.parts[-1] if self.parts else None

    def _added(self, choice: Choice) -> list[Step]:
        is_whole = "message" in choice
        delta = _decode_delta(choice["message"] if is_whole else choice.get("delta", _NOTHING))
        told = _decode_logprobs(choice.get("logprobs", _NULL))
        self._logprobs += (told.content or []) if told else []
        steps: list[Step] = []
        if thought := delta.reasoning_content or delta.reasoning:
            steps += self._thought(thought)
        if delta.content:
            steps += self._text(delta.content)
        for number, call in enumerate(delta.tool_calls or []):
            if is_whole and call.index is None:
                call.index = number
            steps += self._call(call)
        if isinstance(reason := _decode_value(choice.get("finish_reason", _NULL)), str):
            self.finish_reason = reason
            # vLLM's name and SGLang's; other values are token ids.
            stop = _decode_value(choice.get("stop_reason") or choice.get("matched_stop") or _NULL)
            self.stop = stop if isinstance(stop, str) else None
        return steps

    def _thought(self, thought: str) -> list[Step]:
        current = self._current
        if current is not None and current.kind is Kind.REASONING:
            return self._grow(current, thought)
        steps, part = self._begin(Kind.REASONING)
        return [*steps, *self._grow(part, thought)]

    def _text(self, text: str) -> list[Step]:
        current = self._current
        if current is not None and current.kind is Kind.TEXT:
            return self._grow(current, text)
        self._held += text
        return self._show(self._held) if self._held.strip() else []

    def _show(self, text: str) -> list[Step]:
        self._held = ""
        steps, part = self._begin(Kind.TEXT)
        return [*steps, *self._grow(part, text)] if text else steps

    def _call(self, call: _Call) -> list[Step]:
        # White space before a call, and log probabilities of its tokens, are not shown.
        self._held, self._logprobs = "", []
        current, function = self._current, call.function
        goes_on = bool(self._calls) and (call.index == self._calls[-1] or (call.index is None and not call.id))
        if goes_on and current is not None and current.kind is Kind.CALL:
            return self._grow(current, function.arguments) if function.arguments else []
        if goes_on or call.index in self._calls or not function.name:
            message = "the engine sent parts of tool calls in an order that this API cannot show"
            raise ApiError(502, message, "bad_upstream")
        count = len(self._calls)
        self._calls.append(count if call.index is None else call.index)
        steps, part = self._begin(Kind.CALL, call.id or f"call_{self._request_id}_{count}", function.name)
        return [*steps, *self._grow(part, function.arguments)] if function.arguments else steps

    def _begin(self, kind: Kind, call_id: str = "", name: str = "") -> tuple[list[Step], Part]:
        ended = [] if self._current is None else [Step(Action.END, self._current)]
        part = Part(kind, len(self.parts), call_id, name)
        self.parts.append(part)
        return [*ended, Step(Action.BEGIN, Part(kind, part.number, call_id, name))], part

    def _grow(self, part: Part, more: str) -> list[Step]:
        part.said.append(more)
        logprobs: list[msgspec.Raw] = []
        if part.kind is Kind.TEXT:
            logprobs, self._logprobs = self._logprobs, []
            part.logprobs += logprobs
        return [Step(Action.GROW, part, more, logprobs)]


def arguments_of(part: Part) -> Json | msgspec.Raw:
    """A call's arguments as an object. Text that is not one, such as arguments that were cut off, is kept under the
    name that Anthropic recommends for it."""
    text = part.text
    if not text:
        return {}
    try:
        is_object = isinstance(_decode_value(text), dict)
    except (msgspec.DecodeError, RecursionError):
        is_object = False
    return msgspec.Raw(text.encode()) if is_object else {"INVALID_JSON": text}
