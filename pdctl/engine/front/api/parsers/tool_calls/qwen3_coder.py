"""Qwen3-Coder: <tool_call><function=f><parameter=a>1</parameter></function></tool_call>.

Values are text without quotes. A value is JSON if the tool's schema says so, or if it has no type there and can be read
as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from pdctl.engine.front.api.parsers.tool_calls.calls import GrowingText, Namer, ToolText, usual_namer, written

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME = re.compile(r"\s*<function=\s*([^<>\s]+)\s*>")
_VALUE = re.compile(r"\s*<parameter=\s*([^<>]+?)\s*>(.*?)</parameter>", re.DOTALL)
_END = re.compile(r"\s*(</function>|</tool_call>)")

Json = dict[str, object]


class CoderText(GrowingText):
    """See ToolText. Arguments grow by one parameter at a time. `types`: of parameters, by function."""

    def __init__(self, namer: Namer, types: dict[str, Json]) -> None:
        super().__init__(namer)
        self._types = types
        self._now: Callable[[], bool] = self._text
        self._name = ""
        self._arguments = ""

    def _step(self) -> bool:
        return self._now()

    def _text(self) -> bool:
        if not self._show_until(_OPEN):
            return False
        self._now = self._head
        return True

    def _head(self) -> bool:
        head = _NAME.match(self._held)
        if head is not None:
            self._name, self._arguments = head[1], "{"
            self._held = self._held[head.end() :]
            self._begin(self._name, "{")
            self._now = self._parameter
            return True
        end = self._held.find(_CLOSE)
        if end < 0:
            return False
        cut = end + len(_CLOSE)
        self._show(_OPEN + self._held[:cut])
        self._held, self._now = self._held[cut:], self._text
        return True

    def _parameter(self) -> bool:
        """The next parameter, or the end of the function."""
        found = _VALUE.match(self._held)
        if found is not None:
            self._held = self._held[found.end() :]
            mark = "" if self._arguments == "{" else ", "
            self._argue(f"{mark}{written(found[1])}: {self._value(found[1], found[2])}")
            return True
        if _END.match(self._held) is None:
            return False
        self._argue("}")
        self._now = self._close
        return True

    def _argue(self, more: str) -> None:
        self._arguments += more
        self._more(more)

    def _value(self, name: str, text: str) -> str:
        """A parameter's value as JSON."""
        text = text.removeprefix("\n").removesuffix("\n")
        declared = self._types.get(self._name, {}).get(name)
        if declared in ("string", ["string"]):
            return written(text)
        try:
            return written(json.loads(text))
        except (ValueError, RecursionError):
            return written(text)

    def _close(self) -> bool:
        end = self._held.find(_CLOSE)
        if end < 0:
            return False
        self._held, self._now = self._held[end + len(_CLOSE) :], self._text
        return True

    def _finish(self) -> None:
        if self._now == self._head:
            self._show(_OPEN + self._held)
        elif self._now == self._text:
            self._show(self._held)


class _Coder:
    """See Family."""

    markers: tuple[str, ...] = (_OPEN, _CLOSE)
    openers: tuple[str, ...] = (_OPEN,)

    def recognizes(self, template: str) -> bool:
        """See Family.recognizes."""
        return _FUNCTION in template and _PARAMETER in template

    def namer(self, request_id: str) -> Namer:
        """See Family.namer."""
        return usual_namer(request_id)

    def parser(self, namer: Namer, tools: list[Json]) -> ToolText:
        """See Family.parser."""
        return CoderText(namer, {name: types for tool in tools for name, types in _types_of(tool).items()})


def _types_of(tool: Json) -> dict[str, Json]:
    """The declared types of a function's parameters."""
    function = tool.get("function")
    about = function if isinstance(function, dict) else {}
    parameters = about.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    members = properties.items() if isinstance(properties, dict) else ()
    return {str(about.get("name")): {name: one.get("type") for name, one in members if isinstance(one, dict)}}


FAMILY = _Coder()
