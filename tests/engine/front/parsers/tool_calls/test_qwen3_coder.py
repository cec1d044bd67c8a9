from __future__ import annotations

import json

import pytest

from tests.engine.front.parsers.tool_calls.parsing import functions, split

TOOLS: list[dict[str, object]] = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {
        "s": {"type": "string"}, "n": {"type": "integer"}, "any": {}}}}}
]  # fmt: skip


def found(text: str) -> tuple[str, list[tuple[object, object]]]:
    shown, calls = split(text, [], "qwen3_coder", tools=TOOLS)
    return shown, functions(calls)


def call(*parameters: tuple[str, str]) -> str:
    inner = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in parameters)
    return f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("s", "7", "7"), ("s", " a\nb ", " a\nb "), ("n", "7", 7), ("n", "seven", "seven"), ("any", "[1]", [1]),
     ("any", "word", "word"), ("unheard", "true", True), ("s", "<b>&amp;", "<b>&amp;"), ("s", "", "")],
)  # fmt: skip
def test_values_have_the_declared_type(name: str, text: str, value: object) -> None:
    ((function, arguments),) = found(call((name, text)))[1]
    assert (function, json.loads(str(arguments))) == ("f", {name: value})


def test_several_parameters() -> None:
    assert found(call(("s", "a"), ("n", "1")))[1] == [("f", '{"s": "a", "n": 1}')]


@pytest.mark.parametrize(
    "text", ["<tool_call>no call</tool_call>", "<tool_call>\n<function=", "<tool_call", "<tool_call>"]
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert found(text) == (text, [])


def test_a_call_that_is_cut_off_keeps_what_there_is() -> None:
    assert found("<tool_call><function=f><parameter=s>a</parameter><parameter=n>1") == ("", [("f", '{"s": "a"')])
