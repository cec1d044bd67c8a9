"""OpenAI's Responses, checked with the official client's types."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from pdctl.adapters import Choice
from pdctl.net.openai.api import ApiError, Counts, Envelope
from pdctl.proxy.client.unknown_fields import UnknownFields
from pdctl.proxy.translation.responses import RESPONSES
from tests.proxy.translation.chats import Json, call, chat_of, events, outputs, part, streamed, translated, whole

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
CHAT_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
FORMAT = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
ASK: Json = {"model": "m", "input": "hi"}


def refused(**fields: object) -> ApiError:
    with pytest.raises(ApiError) as raised:
        translated(RESPONSES, {**ASK, **fields})
    return raised.value


# -- requests ------------------------------------------------------------------------------------------------


def test_a_text_is_a_message_of_the_user() -> None:
    assert chat_of(RESPONSES, ASK) == {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("fields", "chat"),
    [
        ({"max_output_tokens": 5}, {"max_completion_tokens": 5}),
        ({"temperature": 0.5, "top_p": 0.9, "stream": True}, {"temperature": 0.5, "top_p": 0.9, "stream": True}),
        ({"metadata": {"a": "b"}, "user": "u"}, {"metadata": {"a": "b"}, "user": "u"}),
        ({"reasoning": {"effort": "high"}}, {"reasoning_effort": "high"}),
        ({"text": {"verbosity": "low"}}, {"verbosity": "low"}),
        ({"text": {"format": {"type": "text"}}}, {}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": FORMAT}},
            {"response_format": {"type": "json_schema", "json_schema": {k: FORMAT[k] for k in FORMAT if k != "type"}}},
        ),
        ({"tools": [TOOL]}, {"tools": [CHAT_TOOL]}),
        ({"tools": [TOOL], "tool_choice": "required"}, {"tools": [CHAT_TOOL], "tool_choice": "required"}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}},
            {"tools": [CHAT_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        (
            {"tools": [{**TOOL, "name": "g"}, TOOL],
             "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"name": "f"}]}},
            {"tools": [CHAT_TOOL], "tool_choice": "required"},
        ),
        ({"tools": [TOOL], "parallel_tool_calls": False}, {"tools": [CHAT_TOOL], "parallel_tool_calls": False}),
        ({"tool_choice": "auto"}, {}),
        ({"tool_choice": "required"}, {"tool_choice": "required"}),
        ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
        ({"seed": 3, "top_k": 5, "stop": "x"}, {"seed": 3, "top_k": 5, "stop": "x"}),
        ({"store": False, "background": False, "previous_response_id": None, "truncation": "disabled"}, {}),
        ({"max_output_tokens": None, "tools": None, "text": None, "instructions": None, "reasoning": None}, {}),
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, {"stream": True}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_fields(fields: Json, chat: Json) -> None:
    assert chat_of(RESPONSES, {**ASK, **fields}) == {**chat_of(RESPONSES, ASK), **chat}


def test_items_become_messages() -> None:
    items = [
        {"role": "developer", "content": "b"},
        {"role": "user", "content": [{"type": "input_text", "text": "c"}, {"type": "input_text", "text": "d"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "think"}]},
        {"type": "message", "id": "msg", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "e", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": '{"a":1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"role": "system", "content": "later"},
        {"role": "user", "content": "f"},
    ]  # fmt: skip
    assert chat_of(RESPONSES, {"input": items, "instructions": "a"})["messages"] == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
        {"role": "assistant", "content": "e", "reasoning_content": "think", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": '{"a":1}'}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "system", "content": "later"},
        {"role": "user", "content": "f"},
    ]  # fmt: skip


def test_reasoning_without_text_is_no_message() -> None:
    items = [
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}], "encrypted_content": "x"},
        {"type": "reasoning", "id": "r", "summary": [], "content": []},
        {"role": "user", "content": "a"},
    ]
    assert chat_of(RESPONSES, {"input": items})["messages"] == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"store": True}, "store", "store = true is not supported: this service stores no responses"),
        ({"previous_response_id": "r"}, "previous_response_id", "send the whole conversation as input"),
        ({"conversation": "c"}, "conversation", "send the whole conversation as input"),
        ({"background": True}, "background", "background = true is not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "prompt templates are not supported"),
        ({"truncation": "auto"}, "truncation", "except disabled"),
        ({"moderation": {"model": "x"}}, "moderation", "moderation is not supported"),
        ({"stream_options": {}}, "stream_options", "needs stream = true"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0].type: 'web_search' is not supported"),
        ({"tools": [{"name": "f"}]}, "tools", "tools[0].type: Expected `str`, got `null`"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", "tool_choice.type: 'mcp' is not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0]: Object missing required field `name`"),
        ({"tools": [{**TOOL, "parameters": 3}]}, "tools", "tools[0].parameters: Expected `object | null`, got `int`"),
        ({"tool_choice": "some"}, "tool_choice", "must be none, auto, required or an object; it is 'some'"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text", "missing required field `schema`"),
        ({"tool_choice": 3}, "tool_choice", "tool_choice: Expected `object`, got `int`"),
        ({"text": {"format": {"type": "grammar"}}}, "text", "text.format.type: must be text, json_object or"),
        ({"input": None}, "input", "input: must be a string or a list of items"),
        ({"input": [3]}, "input", "input[0]: Expected `object`, got `int`"),
        ({"input": [{"role": "user", "content": 3}]}, "input", "input[0].content: Expected `str | array | null`"),
        ({"input": [{"role": "robot", "content": ""}]}, "input", "input[0].role: must be user, assistant"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]},
            "input", "input[0].content[0].type: 'input_image' is not supported; content is text here",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input", "content[0].text: is missing"),
        ({"input": ["a", "b"]}, "input", "input[0]: Expected `object`, got `str`"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "input", "stores no responses"),
        ({"input": [{"type": "computer_call"}]}, "input", "input[0].type: 'computer_call' is not supported"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "input[0].call_id: is missing"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input", "input[0].arguments: is"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input", "input[0].output: is missing"),
        ({"input": [{"role": "user"}]}, "input", "input[0].content: is missing"),
        ({"max_output_tokens": "x"}, "max_output_tokens", "Expected `int | null`, got `str`"),
        ({"metadata": {"a": 1}}, "metadata", "Expected `str`, got `int`"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_supported_is_named(fields: Json, param: str, message: str) -> None:
    failure = refused(**fields)
    assert (failure.status, failure.param) == (400, param)
    assert message in failure.message


def test_unknown_fields_are_reported_or_refused() -> None:
    asked = {**ASK, "n": 2, "text": {"tone": "x"}, "reasoning": {"summary": "auto"}}
    assert translated(RESPONSES, asked).ignored == ["n", "text.tone", "reasoning.summary"]
    assert "n" not in chat_of(RESPONSES, asked)
    with pytest.raises(ApiError, match="unknown field n"):
        translated(RESPONSES, asked, refuse=True)


@pytest.mark.parametrize("body", [b"", b"[]", b'"x"', b"{", b'{"input": ' + b"[" * 5000, b'{"input": "\xff"}'])
def test_bodies_that_are_no_requests(body: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        RESPONSES.translate(body, UnknownFields())
    assert raised.value.status == 400


def test_whole_numbers_may_be_written_as_floats() -> None:
    found = RESPONSES.translate(b'{"input": "x", "max_output_tokens": 5.0}', UnknownFields())
    assert found.chat["max_completion_tokens"] == 5


def test_errors_about_a_chats_fields_name_the_clients() -> None:
    failure = ApiError(400, "max_completion_tokens must be from 1 to 9; it is 0", param="max_completion_tokens")
    told = json.loads(RESPONSES.error_body(failure, "r1"))["error"]
    assert (told["param"], told["message"]) == ("max_output_tokens", "max_output_tokens must be from 1 to 9; it is 0")
    other = ApiError(400, "the prompt is empty", param="messages")
    assert json.loads(RESPONSES.error_body(other, "r1"))["error"]["param"] == "input"
    same = ApiError(400, "temperature must be 1", param="temperature")
    assert RESPONSES.error_body(same, "r1") == same.body()


def test_tokens_are_counted_of_what_the_template_shows() -> None:
    asked = {**ASK, "tools": [TOOL], "temperature": 1}
    shown = json.loads(translated(RESPONSES, asked).tokenize_body())
    assert shown == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [CHAT_TOOL],
                     "add_generation_prompt": True}  # fmt: skip
    assert "tools" not in json.loads(translated(RESPONSES, {**asked, "tool_choice": "none"}).tokenize_body())


# -- answers -------------------------------------------------------------------------------------------------


def put_together(found: list[Json]) -> Json:
    """The response that a client has from events alone, checked at each step."""
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    for event in found:
        EVENT.validate_python(event)
    created, in_progress, *steps, last = found
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == in_progress["response"]
    items: list[Json] = []
    for event in steps:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
            continue
        assert event["output_index"] == len(items) - 1
        item = items[-1]
        assert event.get("item_id", item["id"]) == item["id"]
        _apply(kind, event, item)
    assert last["type"] == f"response.{last['response']['status']}"
    assert last["response"]["output"] == items
    return dict(last["response"])


def _apply(kind: str, event: Json, item: Json) -> None:
    if kind == "content_part.added":
        assert item["content"] == []
        item["content"].append(event["part"])
    elif kind == "content_part.done":
        assert item["content"] == [event["part"]]
    elif kind == "function_call_arguments.delta":
        item["arguments"] += event["delta"]
    elif kind == "function_call_arguments.done":
        assert item["arguments"] == event["arguments"]
    elif kind.endswith(".delta"):
        item["content"][0]["text"] += event["delta"]
        if kind == "output_text.delta":
            item["content"][0]["logprobs"] += event["logprobs"]
    elif kind.endswith("text.done"):
        assert item["content"][0]["text"] == event["text"]
    else:
        assert kind == "output_item.done"
        item["status"] = event["item"]["status"]
        assert item == event["item"]


@given(outputs())
def test_a_stream_put_together_is_the_whole_answer(choices: list[Choice]) -> None:
    body = whole(RESPONSES, ASK, choices)
    Response.model_validate(body)
    assert put_together(streamed(RESPONSES, ASK, choices)) == body


@given(outputs())
def test_what_was_answered_can_be_sent_back(choices: list[Choice]) -> None:
    """The output as input of the next request is the assistant's turn."""
    output = whole(RESPONSES, ASK, choices)["output"]
    messages = chat_of(RESPONSES, {"input": [*output, {"role": "user", "content": "go on"}]})["messages"]
    turns = messages[:-1]
    assert {turn["role"] for turn in turns} <= {"assistant"}
    texts = [item["content"][0]["text"] for item in output if item["type"] == "message"]
    assert "".join(turn["content"] or "" for turn in turns) == "".join(texts)
    calls = [one for turn in turns for one in turn.get("tool_calls", [])]
    made = [item for item in output if item["type"] == "function_call"]
    assert [one["id"] for one in calls] == [item["call_id"] for item in made]
    assert [one["function"]["arguments"] for one in calls] == [item["arguments"] or "{}" for item in made]


def test_the_answer_repeats_the_request() -> None:
    asked = {**ASK, "instructions": "be", "max_output_tokens": 9, "metadata": {"a": "b"}, "tools": [TOOL],
             "tool_choice": "required", "temperature": 0.5, "text": {"format": FORMAT}, "user": "u",
             "reasoning": {"effort": "low"}, "parallel_tool_calls": False}  # fmt: skip
    found = whole(RESPONSES, asked, [part("stop", content="a")])
    for name, value in asked.items():
        if name not in ("input", "model", "text", "reasoning"):
            assert found[name] == value
    assert found["text"]["format"] == FORMAT
    assert found["reasoning"]["effort"] == "low"
    assert (found["id"], found["created_at"], found["model"], found["store"]) == ("resp_r1", 100, "m", False)
    assert found["usage"]["total_tokens"] == 10
    assert (found["usage"]["input_tokens"], found["usage"]["output_tokens"]) == (7, 3)


@pytest.mark.parametrize(
    ("reason", "status", "details"),
    [("stop", "completed", None), ("tool_calls", "completed", None),
     ("length", "incomplete", {"reason": "max_output_tokens"}),
     ("content_filter", "incomplete", {"reason": "content_filter"})],
)  # fmt: skip
def test_why_an_answer_ended(reason: str, status: str, details: Json | None) -> None:
    found = whole(RESPONSES, ASK, [call(0, "{}", "f"), part(content="a"), part(reason)])
    assert (found["status"], found["incomplete_details"]) == (status, details)
    assert [item["status"] for item in found["output"]] == ["completed", status]
    assert streamed(RESPONSES, ASK, [part(reason, content="a")])[-1]["type"] == f"response.{status}"


def test_an_error_in_a_stream_is_told_twice() -> None:
    rendering = translated(RESPONSES, ASK).rendering(Envelope("r1", True, "m", False, 100))
    begun = rendering.events(part(content="a"), Counts(7))
    found = events(begun + rendering.error_events(ApiError(502, "it failed", "server_error")))
    for event in found:
        EVENT.validate_python(event)
    error, failed = found[-2:]
    assert (error["type"], error["message"], error["code"]) == ("error", "it failed", "server_error")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"code": "server_error", "message": "it failed"}
    assert [event["sequence_number"] for event in found] == list(range(len(found)))


def test_log_probabilities_are_in_events_and_answer() -> None:
    entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    choices = [part("stop", {"logprobs": {"content": [entry]}}, content="a")]
    asked = {**ASK, "top_logprobs": 1}
    body = whole(RESPONSES, asked, choices)
    assert body["output"][0]["content"][0]["logprobs"] == [entry]
    assert put_together(streamed(RESPONSES, asked, choices)) == body


def test_a_whole_message_of_an_engine_is_like_its_stream() -> None:
    message = msgspec.Raw(b'{"role": "assistant", "content": "ab"}')
    one = {"message": message, "finish_reason": msgspec.Raw(b'"stop"'), "logprobs": msgspec.Raw(b"null")}
    assert whole(RESPONSES, ASK, [one]) == whole(RESPONSES, ASK, [part(content="a"), part("stop", content="b")])
