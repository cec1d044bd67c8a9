"""An output that is one call, because a grammar enforces it: {"name": "f", "arguments": {}}."""

from __future__ import annotations

import re

from pdctl.engine.front.api.parsers.tool_calls.calls import NAME, GrowingText, JsonText, Namer, text_of

_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*{NAME}\s*,\s*"arguments"\s*:\s*(?=\{{)')


class ForcedCall(GrowingText):
    """See ToolText."""

    def __init__(self, namer: Namer) -> None:
        super().__init__(namer)
        self._arguments: JsonText | None = None

    def _step(self) -> bool:
        if self._arguments is not None:
            more, self._held = ("", "") if self._arguments.ended else self._arguments.take(self._held)
            self._more(more)
            return False
        head = _HEAD.match(self._held)
        name = None if head is None else text_of(head[1])
        if head is None or name is None:
            return False
        self._held = self._held[head.end() :]
        self._begin(name, "")
        self._arguments = JsonText()
        return True

    def _finish(self) -> None:
        if self._arguments is None and not self._whole(self._held, "arguments"):
            self._show(self._held)
