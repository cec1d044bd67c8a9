from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.front.tools import ToolCall, ToolFormat, ToolText


def split(text: str, cuts: list[int], form: ToolFormat = ToolFormat.TAGGED) -> tuple[str, list[ToolCall]]:
    parser = ToolText("r", form)
    shown, calls = "", []
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(edges):
        more, found = parser.push(text[start:end])
        shown, calls = shown + more, calls + found
    more, found = parser.flush()
    return shown + more, calls + found


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@given(st.lists(st.integers(0, 200), max_size=12))
def test_calls_are_found_however_the_text_comes(cuts: list[int]) -> None:
    shown, calls = split(f"so: {CALL} and {CALL}!", cuts)
    assert shown == "so:  and !"
    assert [call["index"] for call in calls] == [0, 1]
    assert calls[0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert [call["id"] for call in calls] == ["call_r_0", "call_r_1"], "the same on every engine"


@given(st.text(alphabet="<>/tolca_ {}", max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_text_without_calls_is_only_text(text: str, cuts: list[int]) -> None:
    assert split(text, cuts) == (text, [])


@pytest.mark.parametrize("inside", ["no json", '{"arguments": {}}', "[1]", "7"])
def test_what_is_no_call_is_shown(inside: str) -> None:
    text = f"<tool_call>{inside}</tool_call>"
    assert split(text, [3, 14]) == (text, [])


def test_a_call_cut_off_is_shown() -> None:
    assert split('x<tool_call>{"name": "f"', []) == ('x<tool_call>{"name": "f"', [])


def test_forced_output_is_one_call() -> None:
    shown, calls = split(json.dumps({"name": "g", "arguments": {}}), [4], ToolFormat.FORCED)
    assert shown == ""
    assert calls[0]["function"] == {"name": "g", "arguments": "{}"}
    assert split('{"name": "g"', [], ToolFormat.FORCED) == ('{"name": "g"', [])
