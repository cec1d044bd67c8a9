"""Tool calls in OpenAI's format, with arguments as they grow, and what the families' parsers share."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

ToolCall = dict[str, object]
# The id of a request's call, by the call's number.
Namer = Callable[[int], str]

# A name, as text in JSON, followed by arguments that are an object. A call in another form comes when it is complete.
NAME = r'("(?:[^"\\]|\\.)*")'


class ToolText(Protocol):
    """Splits growing text into plain text and tool calls. It depends only on the text, so it can be replayed.

    Calls come in parts, as in OpenAI's streams: the first part of a call has its id and name, later parts more of its
    arguments. `found`: the number of calls so far.
    """

    @property
    def found(self) -> int:
        """The number of calls so far."""
        ...

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take new text; returns text to show and parts of calls."""
        ...

    def flush(self) -> tuple[str, list[ToolCall]]:
        """The rest at the end: a call that was cut off before its arguments is shown as text."""
        ...


class GrowingText(ABC):
    """A ToolText that consumes held text step by step.

    White space between calls, and after the last one, is not shown. `_step` takes what it can from `_held`, shows text,
    adds parts of calls, and returns whether to go on.
    """

    def __init__(self, namer: Namer) -> None:
        self.found = 0
        self._namer = namer
        self._held = ""
        self._shown = ""
        # White space after a call, which is shown only with more text. None if text has followed.
        self._blank: str | None = None
        self._calls: list[ToolCall] = []
        # Looks for the end of an object that is taken as a whole.
        self._object = JsonText()
        self._scanned = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """See ToolText.push."""
        self._held += text
        while self._step():
            pass
        return self._taken()

    def flush(self) -> tuple[str, list[ToolCall]]:
        """See ToolText.flush."""
        self._finish()
        self._held = ""
        return self._taken()

    @abstractmethod
    def _step(self) -> bool: ...

    @abstractmethod
    def _finish(self) -> None: ...

    def _taken(self) -> tuple[str, list[ToolCall]]:
        shown, calls = self._shown, self._calls
        self._shown, self._calls = "", []
        return shown, calls

    def _show(self, text: str) -> None:
        text = (self._blank or "") + text
        if self._blank is not None and not text.strip():
            self._blank = text
        else:
            self._shown, self._blank = self._shown + text, None

    def _show_until(self, *markers: str) -> str:
        """Show text up to the first of the markers, and drop that. Returns it, or "" if there is none yet; then a
        possible beginning of one is held back."""
        found = [(at, marker) for marker in markers if (at := self._held.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            self._show(self._held[:at])
            self._held = self._held[at + len(marker) :]
            return marker
        cut = len(self._held) - max(overlap(self._held, marker) for marker in markers)
        self._show(self._held[:cut])
        self._held = self._held[cut:]
        return ""

    def _begin(self, name: str, arguments: str) -> None:
        """Add the first part of a call."""
        function: ToolCall = {"name": name, "arguments": arguments}
        self._calls.append(
            {"index": self.found, "id": self._namer(self.found), "type": "function", "function": function}
        )
        self.found += 1
        self._blank = ""

    def _more(self, arguments: str) -> None:
        """Add more of the last call's arguments."""
        if arguments:
            self._calls.append({"index": self.found - 1, "function": {"arguments": arguments}})

    def _whole_object(self) -> str | None:
        """The object at the beginning of the held text, if it is complete. The text stays held."""
        more, _ = self._object.take(self._held[self._scanned :])
        self._scanned += len(more)
        if not self._object.ended:
            return None
        found = self._held[: self._scanned]
        self._object, self._scanned = JsonText(), 0
        return found

    def _whole(self, text: str, *keys: str, needed: bool = False) -> bool:
        """Add a complete call, an object with a name and arguments under one of the keys; False if it is none.

        `needed`: without arguments it is none."""
        found = call_of(text, *keys, needed=needed)
        if found is not None:
            self._begin(*found)
        return found is not None


class JsonText:
    """Finds the end of a JSON object or list in growing text. `depth`: how many are already open; `ends`: letters that
    JSON cannot have outside of strings, and with which the model ended the call before the value."""

    def __init__(self, depth: int = 0, ends: str = "<") -> None:
        self.ended = False
        self._ends = ends
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def take(self, text: str) -> tuple[str, str]:
        """Split text into the part that belongs to the value and the rest."""
        for at, letter in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_string = True
            elif letter in self._ends:
                self.ended = True
                return text[:at], text[at:]
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return text[: at + 1], text[at + 1 :]
        return text, ""


def overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that is a beginning of `marker`, but not all of it."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)


def call_of(text: str, *keys: str, needed: bool = False) -> tuple[str, str] | None:
    """Name and arguments of a call that is a complete JSON object; None if it is none. See GrowingText._whole."""
    try:
        found = json.loads(text)
        name = found["name"]
        name.encode()
        given = [found[key] for key in keys if key in found]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if needed and not given:
        return None
    return name, written(given[0] if given else {})


def written(value: object) -> str:
    """A value as JSON. JSON can contain half a surrogate pair, which cannot be sent: then everything is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if _is_text(text) else json.dumps(value)


def text_of(literal: str) -> str | None:
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


def usual_namer(request_id: str) -> Namer:
    """Ids in OpenAI's form."""
    return lambda number: f"call_{request_id}_{number}"


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
