from __future__ import annotations

import pytest

from pdctl.engine.front.api.parsers.tool_calls.calls import JsonText
from tests.engine.front.parsers.tool_calls.parsing import functions, parser, split


def found(text: str) -> tuple[str, list[tuple[object, object]]]:
    shown, calls = split(text, [], "llama3")
    return shown, functions(calls)


@pytest.mark.parametrize(
    "text",
    ['{"city": "Paris"}', '{"name": "Ann", "age": 3}', '{"name": 7, "parameters": {}}', '{"name": "f"}', '{"name": "f',
     "{", '["name"]', 'So: {"name": "f", "parameters": {}}', "<|python_tag|>print(1)", "<|python", "<",
     '<|python_tag|>{"a": 1} and more', '{"name": "\\q", "parameters": {}}', '{"parameters": {}}', "{}"],
)  # fmt: skip
def test_what_is_no_call_is_text(text: str) -> None:
    assert found(text) == (text, [])


def test_an_answer_in_json_comes_while_it_grows() -> None:
    one = parser("llama3")
    assert one.push('{"ci') == ("", [])
    assert one.push('ty": "Pa') == ('{"city": "Pa', [])
    assert one.push('ris"}') == ('ris"}', [])


def test_a_call_may_come_after_text_with_the_tag_only() -> None:
    assert found('Well.<|python_tag|>{"name": "f", "parameters": {}}') == ("Well.", [("f", "{}")])


@pytest.mark.parametrize("between", ["; ", ";", "\n", ";\n<|python_tag|>", ""])
def test_calls_follow_each_other(between: str) -> None:
    text = f'{{"name": "f", "parameters": {{"a": ";"}}}}{between}{{"parameters": {{"b": 2}}, "name": "g"}}'
    assert found(text) == ("", [("f", '{"a": ";"}'), ("g", '{"b": 2}')])


def test_text_after_a_call_is_shown() -> None:
    assert found('{"name": "f", "parameters": {}}; done') == ("; done", [("f", "{}")])


def test_a_call_that_is_cut_off_keeps_what_there_is() -> None:
    assert found('{"name": "f", "parameters": {"a": [1, ') == ("", [("f", '{"a": [1, ')])
    assert found('{"name": "f", "parameters": {"a": 1; {"name": "g", "parameters": {}}')[1][0] == ("f", '{"a": 1')


def test_a_long_object_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held back until its end, because it may still be a call."""
    read = 0
    take = JsonText.take

    def counted(scan: JsonText, text: str) -> tuple[str, str]:
        nonlocal read
        read += len(text)
        return take(scan, text)

    monkeypatch.setattr(JsonText, "take", counted)
    one = parser("llama3")
    pieces = ['{"name": "Ann", "notes": "', *["some more "] * 1000, '"}']
    shown = "".join(one.push(piece)[0] for piece in pieces)
    assert shown == "".join(pieces)
    assert read == len(shown)
