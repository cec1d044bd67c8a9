from __future__ import annotations

from typing import Any

import pytest

from pdctl.engine.front.api.messages import messages_of
from pdctl.net.openai.api import ApiError


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [('{"a": [1]}', {"a": [1]}), ("", {}), ({"a": 1}, {"a": 1}), ("{", "{"), ("[1]", "[1]"), (None, None)],
)  # fmt: skip
def test_templates_get_arguments_as_objects(arguments: Any, shown: Any) -> None:
    (found,) = messages_of([{"role": "assistant", "content": None, "tool_calls": [call(arguments)]}])
    assert found["tool_calls"] == [call(shown)]


@pytest.mark.parametrize("calls", [None, "x", [None], [{}], [{"function": 7}]])
def test_calls_in_another_form_are_left_to_the_template(calls: Any) -> None:
    (found,) = messages_of([{"role": "assistant", "content": "", "tool_calls": calls}])
    assert found["tool_calls"] == calls


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_shown_under_both_names(name: str) -> None:
    (found,) = messages_of([{"role": "assistant", "content": "b", name: "a"}])
    assert (found["reasoning"], found["reasoning_content"]) == ("a", "a")


def test_texts_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages_of([{"role": "user", "content": parts}])[0]["content"] == "ab"
    with pytest.raises(ApiError, match=r"messages\[0\].content must be a string"):
        messages_of([{"role": "user", "content": [{"type": "image_url"}]}])
