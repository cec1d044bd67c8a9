"""Runs a parser of tool calls over a text, in one piece or in several."""

from __future__ import annotations

from itertools import pairwise

from pdctl.engine.front.api.parsers.tool_calls import ToolCall, ToolFormat, ToolText, family, tool_text, whole_calls

Tools = list[dict[str, object]]


def parser(name: str, form: ToolFormat = ToolFormat.FREE, tools: Tools | None = None) -> ToolText:
    return tool_text(family(name), form, "r", tools)


def split(
    text: str, cuts: list[int], name: str, form: ToolFormat = ToolFormat.FREE, tools: Tools | None = None
) -> tuple[str, list[ToolCall]]:
    """Shown text and complete calls, if the text comes in pieces that end at `cuts`."""
    found = parser(name, form, tools)
    shown = ""
    calls: list[ToolCall] = []
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(edges):
        more, parts = found.push(text[start:end])
        shown, calls = shown + more, calls + parts
    more, parts = found.flush()
    return shown + more, whole_calls(calls + parts)


def functions(calls: list[ToolCall]) -> list[tuple[object, object]]:
    """Name and arguments of each call."""
    found = []
    for call in calls:
        function = call["function"]
        assert isinstance(function, dict)
        found.append((function["name"], function["arguments"]))
    return found
