"""Find tool calls in a chat's output text and return them in OpenAI's format, with arguments as they grow."""

from __future__ import annotations

import json
import re
from enum import Enum, auto

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# The beginning of a call up to its arguments. A call in another form is returned only when complete.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')

ToolCall = dict[str, object]


class ToolFormat(Enum):
    """The format of a call in the output. Tagged: JSON between <tool_call> tags (Hermes, Qwen); forced: only JSON."""

    NONE = auto()
    TAGGED = auto()
    FORCED = auto()


class ToolText:
    """Splits growing text into plain text and tool calls. It depends only on the text, so it can be replayed.

    Calls come in parts, as in OpenAI's streams: the first part of a call has its id and name, later parts more of its
    arguments.
    """

    def __init__(self, request_id: str, form: ToolFormat) -> None:
        self.found = 0
        self._request_id = request_id
        self._form = form
        self._held = ""
        self._inside = form is ToolFormat.FORCED
        self._arguments: _Object | None = None

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take new text; returns text to show and parts of calls."""
        if self._form is ToolFormat.NONE:
            return text, []
        self._held += text
        shown = ""
        calls: list[ToolCall] = []
        while True:
            before = self._place
            if self._inside:
                shown += self._in_call(calls)
            else:
                shown += self._between_calls()
            if before == self._place:
                return shown, calls

    @property
    def _place(self) -> tuple[int, bool, bool]:
        """Changes as long as there is more to be found."""
        return len(self._held), self._inside, self._arguments is not None and self._arguments.ended

    def flush(self) -> tuple[str, list[ToolCall]]:
        """The rest at the end: a call that was cut off before its arguments is shown as text."""
        rest, self._held = self._held, ""
        if self._arguments is not None or not self._inside:
            return ("", []) if self._inside else (rest, [])
        if self._form is ToolFormat.FORCED:
            call = self._whole_call(rest)
            return (rest, []) if call is None else ("", [call])
        return _OPEN + rest, []

    def _between_calls(self) -> str:
        """Text up to the next call. A possible beginning of a tag is held back."""
        start = self._held.find(_OPEN)
        if start >= 0:
            shown, self._held = self._held[:start], self._held[start + len(_OPEN) :]
            self._inside = True
            return shown
        keep = next((n for n in range(len(_OPEN) - 1, 0, -1) if self._held.endswith(_OPEN[:n])), 0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _in_call(self, calls: list[ToolCall]) -> str:
        if self._arguments is None:
            head = _HEAD.match(self._held)
            name = None if head is None else _text_of(head[1])
            if head is None or name is None:
                return self._not_begun(calls)
            self._held = self._held[head.end() :]
            self._arguments = _Object()
            calls.append(self._first_part(name, ""))
        if not self._arguments.ended:
            more, self._held = self._arguments.take(self._held)
            if more:
                calls.append({"index": self.found - 1, "function": {"arguments": more}})
        elif (end := self._held.find(_CLOSE)) >= 0 and self._form is ToolFormat.TAGGED:
            self._leave(end)
        return ""

    def _not_begun(self, calls: list[ToolCall]) -> str:
        """Handle a call before its arguments are recognized: it is returned when complete."""
        end = self._held.find(_CLOSE) if self._form is ToolFormat.TAGGED else -1
        if end < 0:
            return ""
        inside = self._held[:end]
        self._leave(end)
        call = self._whole_call(inside)
        if call is None:
            return f"{_OPEN}{inside}{_CLOSE}"
        calls.append(call)
        return ""

    def _leave(self, end: int) -> None:
        self._held = self._held[end + len(_CLOSE) :]
        self._inside, self._arguments = False, None

    def _whole_call(self, text: str) -> ToolCall | None:
        try:
            found = json.loads(text)
            name, arguments = found["name"], found.get("arguments", {})
            name.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        # Escape invalid text: JSON can contain half a surrogate pair, which cannot be sent.
        written = json.dumps(arguments, ensure_ascii=False)
        return self._first_part(name, written if _is_text(written) else json.dumps(arguments))

    def _first_part(self, name: str, arguments: str) -> ToolCall:
        call: ToolCall = {
            "index": self.found,
            # Equal on every engine that a request visits.
            "id": f"call_{self._request_id}_{self.found}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        self.found += 1
        return call


def _text_of(literal: str) -> str | None:
    """The text of a JSON string; None if it is not one."""
    try:
        text = str(json.loads(literal))
    except ValueError:
        return None
    return text if _is_text(text) else None


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Object:
    """Finds the end of a JSON object in growing text."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def take(self, text: str) -> tuple[str, str]:
        """Split text into the part that belongs to the object and the rest."""
        for at, letter in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == "<":
                # Not valid JSON: the model closed the call before the object.
                self.ended = True
                return text[:at], text[at:]
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return text[: at + 1], text[at + 1 :]
        return text, ""


def whole_calls(parts: list[ToolCall]) -> list[ToolCall]:
    """Complete calls joined from their parts, for an unstreamed answer."""
    return [{name: call[name] for name in call if name != "index"} for call in joined(parts)]


def joined(parts: list[ToolCall]) -> list[ToolCall]:
    """Join the parts of each call: clients treat two parts of a call in one event as two calls."""
    found: dict[object, ToolCall] = {}
    for part in parts:
        function = part["function"]
        assert isinstance(function, dict)
        if (call := found.get(part["index"])) is None:
            found[part["index"]] = {**part, "function": {**function}}
        else:
            whole = call["function"]
            assert isinstance(whole, dict)
            whole["arguments"] += function["arguments"]
    return list(found.values())
