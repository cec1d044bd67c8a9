from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.front.api.parsers.tool_calls import ToolCall, ToolFormat, joined
from tests.engine.front.parsers.tool_calls.parsing import parser as parser_of
from tests.engine.front.parsers.tool_calls.parsing import split as split_by


def split(text: str, cuts: list[int], form: ToolFormat = ToolFormat.FREE) -> tuple[str, list[ToolCall]]:
    return split_by(text, cuts, "hermes", form)


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@given(st.lists(st.integers(0, 200), max_size=12))
def test_calls_are_found_however_the_text_comes(cuts: list[int]) -> None:
    shown, calls = split(f"so: {CALL} and {CALL}!", cuts)
    assert shown == "so:  and !"
    assert calls[0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert [call["id"] for call in calls] == ["call_r_0", "call_r_1"], "the same on every engine"


@given(st.text(alphabet="<>/tolca_ {}", max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_text_without_calls_is_only_text(text: str, cuts: list[int]) -> None:
    assert split(text, cuts) == (text, [])


@pytest.mark.parametrize(
    "inside",
    ["no json", '{"arguments": {}}', "[1]", "7", r'{"name": "\q", "arguments": {}}',
     '{"name": "a\tb", "arguments": {}}',
     r'{"name": "\ud800", "arguments": {}}', r'{"arguments": {}, "name": "\ud800"}', '{"name": 5, "arguments": {}}'],
)  # fmt: skip
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


TRICKY = '{"a": "}\\"</tool_call>{[", "b": [{}, "\\\\"], "c": {"d": null}}'


@given(st.lists(st.integers(0, 200), max_size=12))
def test_arguments_may_hold_what_looks_like_an_end(cuts: list[int]) -> None:
    text = f'<tool_call>{{"name": "f\\u0041", "arguments": {TRICKY}}}</tool_call>!'
    shown, (call,) = split(text, cuts)
    assert (shown, call["function"]) == ("!", {"name": "fA", "arguments": TRICKY})


def test_arguments_come_while_they_grow() -> None:
    parser = parser_of("hermes", ToolFormat.FORCED)
    assert parser.push('{"name": "f", "argu') == ("", [])
    _, (first, second) = parser.push('ments": {"a')
    assert first["function"] == {"name": "f", "arguments": ""}
    assert second == {"index": 0, "function": {"arguments": '{"a'}}
    assert joined([first, second])[0]["function"] == {"name": "f", "arguments": '{"a'}
    assert parser.push('": 1}}') == ("", [{"index": 0, "function": {"arguments": '": 1}'}}])
    assert parser.flush() == ("", [])


@given(st.lists(st.integers(0, 200), max_size=6))
def test_a_call_in_another_order_is_given_whole(cuts: list[int]) -> None:
    text = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
    shown, (call,) = split(text, cuts)
    assert (shown, call["function"]) == ("", {"name": "f", "arguments": '{"a": 1}'})


@given(st.lists(st.integers(0, 200), max_size=6))
def test_a_call_cut_off_within_its_arguments_keeps_what_there_is(cuts: list[int]) -> None:
    shown, (call,) = split('x<tool_call>{"name": "f", "arguments": {"a": ', cuts)
    assert (shown, call["function"]) == ("x", {"name": "f", "arguments": '{"a": '})
    shown, (call,) = split('x<tool_call>{"name": "f", "arguments": {"a": </tool_call>y', cuts)
    assert (shown, call["function"]) == ("xy", {"name": "f", "arguments": '{"a": '})


def test_half_a_surrogate_pair_in_arguments_stays_written_as_it_was() -> None:
    text = r'<tool_call>{"arguments": {"a": "\ud800"}, "name": "f"}</tool_call>'
    _, (call,) = split(text, [])
    assert call["function"] == {"name": "f", "arguments": r'{"a": "\ud800"}'}
    json.dumps(call, ensure_ascii=False).encode()
