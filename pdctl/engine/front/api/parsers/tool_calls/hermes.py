"""Hermes and Qwen: JSON between tags, <tool_call>{"name": "f", "arguments": {}}</tool_call>."""

from __future__ import annotations

import re

from pdctl.engine.front.api.parsers.tool_calls.calls import (
    NAME,
    GrowingText,
    JsonText,
    Namer,
    ToolText,
    text_of,
    usual_namer,
)

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*{NAME}\s*,\s*"arguments"\s*:\s*(?=\{{)')


class HermesText(GrowingText):
    """See ToolText."""

    def __init__(self, namer: Namer) -> None:
        super().__init__(namer)
        self._inside = False
        self._arguments: JsonText | None = None

    def _step(self) -> bool:
        if not self._inside:
            self._inside = self._show_until(_OPEN) == _OPEN
            return self._inside
        if self._arguments is None:
            return self._head()
        if not self._arguments.ended:
            more, self._held = self._arguments.take(self._held)
            self._more(more)
            return self._arguments.ended
        return self._closed() is not None

    def _head(self) -> bool:
        """A call before its arguments are recognized."""
        head = _HEAD.match(self._held)
        name = None if head is None else text_of(head[1])
        if head is not None and name is not None:
            self._held = self._held[head.end() :]
            self._begin(name, "")
            self._arguments = JsonText()
            return True
        inside = self._closed()
        if inside is None:
            return False
        if not self._whole(inside, "arguments"):
            self._show(f"{_OPEN}{inside}{_CLOSE}")
        return True

    def _closed(self) -> str | None:
        """Leave a call at its end. Returns the text before that, or None if there is no end yet."""
        end = self._held.find(_CLOSE)
        if end < 0:
            return None
        inside, self._held = self._held[:end], self._held[end + len(_CLOSE) :]
        self._inside, self._arguments = False, None
        return inside

    def _finish(self) -> None:
        # A complete call may lack its end: models stop there.
        if self._arguments is None and not (self._inside and self._whole(self._held, "arguments")):
            self._show(_OPEN + self._held if self._inside else self._held)


class _Hermes:
    """See Family."""

    markers: tuple[str, ...] = (_OPEN, _CLOSE)
    openers: tuple[str, ...] = (_OPEN,)

    def recognizes(self, template: str) -> bool:
        """See Family.recognizes."""
        return _OPEN in template

    def namer(self, request_id: str) -> Namer:
        """See Family.namer."""
        return usual_namer(request_id)

    def parser(self, namer: Namer, tools: list[dict[str, object]]) -> ToolText:
        """See Family.parser."""
        return HermesText(namer)


FAMILY = _Hermes()
