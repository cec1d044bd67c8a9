"""Llama 3: the output is JSON, {"name": "f", "parameters": {}}, after <|python_tag|> or not; more calls follow a `;`.

An object at the beginning is a call only if its members say so: models also answer in JSON. Later in the output, only
the tag begins a call.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pdctl.engine.front.api.parsers.tool_calls.calls import (
    NAME,
    GrowingText,
    JsonText,
    Namer,
    ToolText,
    text_of,
    usual_namer,
)

_TAG = "<|python_tag|>"
_HEAD = re.compile(
    rf'\s*\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*{NAME}\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\{{)'
)
_FIRST_KEY = re.compile(r'\{\s*"([^"]*)"')
_BEFORE_FIRST_KEY = re.compile(r'\{\s*("[^"]{0,16})?')
_KEYS = ("parameters", "arguments")
_FIRST_KEYS = frozenset({"name", "type", "id", *_KEYS})
# Between two calls.
_SEPARATORS = " \t\r\n;"
# A model that ends a call within its arguments goes on with one of these.
_ENDS = "<;"


class LlamaText(GrowingText):
    """See ToolText."""

    def __init__(self, namer: Namer) -> None:
        super().__init__(namer)
        self._now: Callable[[], bool] = self._between
        # Text before a call that is not shown if there is a call.
        self._before = ""
        self._arguments = JsonText()
        self._outer = JsonText()

    def _step(self) -> bool:
        return self._now()

    def _between(self) -> bool:
        """The beginning of the output, and what follows a call or a tag."""
        rest = self._held.lstrip(_SEPARATORS if self.found else None)
        if not rest or (rest != _TAG and _TAG.startswith(rest)):
            return False
        self._before += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if rest.startswith(_TAG):
            self._before, self._held = self._before + _TAG, rest[len(_TAG) :]
            return True
        if rest.startswith("{"):
            self._now = self._head
            return True
        return self._no_call()

    def _no_call(self) -> bool:
        """What is held is text."""
        self._show(self._before)
        self._before, self._now = "", self._text
        return True

    def _text(self) -> bool:
        if not self._show_until(_TAG):
            return False
        self._before, self._now = _TAG, self._between
        return True

    def _head(self) -> bool:
        """An object that may be a call."""
        head = _HEAD.match(self._held)
        name = None if head is None else text_of(head[1])
        if head is not None and name is not None:
            self._held = self._held[head.end() :]
            self._begin(name, "")
            self._before, self._now, self._arguments = "", self._grow, JsonText(ends=_ENDS)
            return True
        first = _FIRST_KEY.match(self._held)
        if first[1] not in _FIRST_KEYS if first else not _BEFORE_FIRST_KEY.fullmatch(self._held):
            return self._no_call()
        whole = self._whole_object()
        if whole is None:
            return False
        if not self._whole(whole, *_KEYS, needed=True):
            return self._no_call()
        self._before, self._held, self._now = "", self._held[len(whole) :], self._between
        return True

    def _grow(self) -> bool:
        more, self._held = self._arguments.take(self._held)
        self._more(more)
        if self._arguments.ended:
            self._now, self._outer = self._tail, JsonText(depth=1, ends=_ENDS)
        return self._arguments.ended

    def _tail(self) -> bool:
        """The rest of an object after its arguments."""
        _, self._held = self._outer.take(self._held)
        if self._outer.ended:
            self._now = self._between
        return self._outer.ended

    def _finish(self) -> None:
        if self._now in (self._grow, self._tail):
            return
        if self._now == self._between and self.found and not self._held.strip(_SEPARATORS):
            return
        self._show(self._before + self._held)


class _Llama:
    """See Family."""

    markers: tuple[str, ...] = (_TAG,)
    openers: tuple[str, ...] = (_TAG,)

    def recognizes(self, template: str) -> bool:
        """See Family.recognizes."""
        return _TAG in template or ("<|start_header_id|>" in template and '"parameters"' in template)

    def namer(self, request_id: str) -> Namer:
        """See Family.namer."""
        return usual_namer(request_id)

    def parser(self, namer: Namer, tools: list[dict[str, object]]) -> ToolText:
        """See Family.parser."""
        return LlamaText(namer)


FAMILY = _Llama()
