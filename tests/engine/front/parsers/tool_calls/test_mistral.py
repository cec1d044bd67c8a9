from __future__ import annotations

import pytest

from tests.engine.front.parsers.tool_calls.parsing import functions, split


def found(text: str) -> tuple[str, list[tuple[object, object]]]:
    shown, calls = split(text, [], "mistral")
    return shown, functions(calls)


@pytest.mark.parametrize(
    "text",
    ["[TOOL_CALLS]", "[TOOL_CALLS] ", "[TOOL_CALLS]what is this?", "[TOOL_CALLS] []", '[TOOL_CALLS] [{"a": 1}]',
     "[TOOL_CALLS] [7]", "[TOOL_CALLS][ARGS]{}", "[TOOL_CALLS]f", "[TOOL_CALLS]f[ARGS]", "[TOOL_CALLS]f[AR",
     '[TOOL_CALLS] [{"name": "f"', '[TOOL_CALLS] [{"name": 3, "arguments": {}}]', "[TOOL_CAL", "a [b] c"],
)  # fmt: skip
def test_what_is_no_call_is_text(text: str) -> None:
    assert found(text) == (text, [])


def test_a_call_may_have_an_id_of_its_own() -> None:
    """It is not used: ids must be unique, also after a failover."""
    assert found('[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}') == ("", [("f", '{"a": 1}')])
    assert found('[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}]') == ("", [("f", "{}")])


def test_one_object_instead_of_a_list() -> None:
    assert found('[TOOL_CALLS]{"name": "f", "arguments": {"a": []}}!') == ("!", [("f", '{"a": []}')])


def test_a_list_goes_on_after_each_call() -> None:
    text = '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}} , {"arguments": {}, "name": "g"}, oops]'
    assert found(text) == (" oops]", [("f", '{"a": 1}'), ("g", "{}")])


def test_a_call_that_is_cut_off_keeps_what_there_is() -> None:
    assert found('[TOOL_CALLS]f[ARGS]{"a": "[TOOL_CALLS]') == ("", [("f", '{"a": "[TOOL_CALLS]')])
