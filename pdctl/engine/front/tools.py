"""Tool calls in a chat's output text: found, cut out, and given as OpenAI words them."""

from __future__ import annotations

import json
from enum import Enum, auto

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"

ToolCall = dict[str, object]


class ToolFormat(Enum):
    """How a call looks in the output. Tagged: JSON between <tool_call> tags (Hermes, Qwen); forced: JSON alone."""

    NONE = auto()
    TAGGED = auto()
    FORCED = auto()


class ToolText:
    """Splits growing text into what is said and what is called. Depends on the text alone, so it can be replayed."""

    def __init__(self, request_id: str, form: ToolFormat) -> None:
        self.found = 0
        self._request_id = request_id
        self._form = form
        self._held = ""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Text to show, and calls that became whole."""
        if self._form is ToolFormat.NONE:
            return text, []
        self._held += text
        if self._form is ToolFormat.FORCED:
            return "", []
        shown = ""
        calls: list[ToolCall] = []
        while (start := self._held.find(_OPEN)) >= 0:
            end = self._held.find(_CLOSE, start)
            shown += self._held[:start]
            if end < 0:
                self._held = self._held[start:]
                return shown, calls
            inside = self._held[start + len(_OPEN) : end]
            self._held = self._held[end + len(_CLOSE) :]
            call = self._call(inside)
            if call is None:
                shown += f"{_OPEN}{inside}{_CLOSE}"
            else:
                calls.append(call)
        keep = next((n for n in range(len(_OPEN) - 1, 0, -1) if self._held.endswith(_OPEN[:n])), 0)
        cut = len(self._held) - keep
        shown, self._held = shown + self._held[:cut], self._held[cut:]
        return shown, calls

    def flush(self) -> tuple[str, list[ToolCall]]:
        """What is left at the end: a call that was cut off is shown as text."""
        rest, self._held = self._held, ""
        if self._form is ToolFormat.FORCED and (call := self._call(rest)) is not None:
            return "", [call]
        return rest, []

    def _call(self, text: str) -> ToolCall | None:
        try:
            found = json.loads(text)
            name, arguments = found["name"], found.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        call: ToolCall = {
            "index": self.found,
            # The same on every engine that a request visits.
            "id": f"call_{self._request_id}_{self.found}",
            "type": "function",
            "function": {"name": str(name), "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        self.found += 1
        return call
