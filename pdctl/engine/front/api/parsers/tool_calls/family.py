"""What a family of models provides so that its tool calls are found."""

from __future__ import annotations

from typing import Protocol

from pdctl.engine.front.api.parsers.tool_calls.calls import Namer, ToolCall, ToolText


class Family(Protocol):
    """How a family of models writes tool calls.

    `markers`: texts that mark the parts of a call and that tokenizers may have as special tokens; `openers`: those of
    them that begin a call, wherever they come.
    """

    markers: tuple[str, ...]
    openers: tuple[str, ...]

    def recognizes(self, template: str) -> bool:
        """Whether a chat template asks for calls of this family."""
        ...

    def namer(self, request_id: str) -> Namer:
        """Gives each call of a request its id, which is the same on every engine."""
        ...

    def parser(self, namer: Namer, tools: list[dict[str, object]]) -> ToolText:
        """The parser of one answer. `tools`: the request's."""
        ...


class PlainText:
    """See ToolText. There are no calls."""

    found = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """See ToolText.push."""
        return text, []

    def flush(self) -> tuple[str, list[ToolCall]]:
        """See ToolText.flush."""
        return "", []
