from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec

from pdctl.proxy.answers.gather import Gathered


def gathered(chat: bool, *events: Mapping[str, object], ids: bool = False) -> dict[str, object]:
    found = Gathered(chat, ids)
    for number, event in enumerate(events):
        choice = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in event.items()}
        found.add(choice, [number])
    return dict(json.loads(msgspec.json.encode(found.choice())))


def test_text_grows_and_the_last_reason_stays() -> None:
    found = gathered(False, {"text": "a", "finish_reason": None}, {"text": "b", "finish_reason": "stop"}, ids=True)
    assert found == {"text": "ab", "finish_reason": "stop", "token_ids": [0, 1]}


def test_logprobs_of_completions_are_joined_list_by_list() -> None:
    one = {"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}}
    two = {"text": "b", "logprobs": {"tokens": ["b"], "token_logprobs": [-2.0], "top_logprobs": [{"b": -2.0}]}}
    found = gathered(False, one, two)
    assert found["logprobs"] == {
        "tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0], "top_logprobs": [{"a": -1.0}, {"b": -2.0}],
    }  # fmt: skip


def test_a_chats_deltas_become_its_message() -> None:
    found = gathered(
        True,
        {"delta": {"role": "assistant", "content": ""}, "finish_reason": None},
        {"delta": {"content": "Hi"}, "logprobs": {"content": [{"token": "Hi"}]}},
        {"delta": {"content": "!", "reasoning_content": "hm"}, "logprobs": {"content": [{"token": "!"}]}},
        {"delta": {}, "finish_reason": "stop"},
    )
    assert found["message"] == {"role": "assistant", "content": "Hi!", "reasoning_content": "hm"}
    assert found["logprobs"] == {"content": [{"token": "Hi"}, {"token": "!"}]}
    assert found["finish_reason"] == "stop"


def test_tool_calls_are_put_together_by_their_index() -> None:
    def call(index: int, **function: str) -> dict[str, object]:
        named = {"id": f"c{index}", "type": "function"} if "name" in function else {}
        return {"delta": {"tool_calls": [{"index": index, **named, "function": function}]}}

    found = gathered(
        True, call(0, name="f", arguments=""), call(0, arguments='{"a"'), call(1, name="g", arguments="{}"),
        call(0, arguments=":1}"), {"delta": {}, "finish_reason": "tool_calls"},
    )  # fmt: skip
    message = found["message"]
    assert isinstance(message, dict)
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_nothing_is_an_empty_answer() -> None:
    assert gathered(True)["message"] == {"role": "assistant", "content": ""}
