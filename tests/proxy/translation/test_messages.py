"""Anthropic's Messages. The official client reads them in `scripts/clients`."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given

from pdctl.adapters import Choice
from pdctl.net.openai.api import ApiError, Counts, Envelope
from pdctl.proxy.client.unknown_fields import UnknownFields
from pdctl.proxy.translation.messages import MESSAGES
from tests.proxy.translation.chats import Json, call, chat_of, events, outputs, part, streamed, translated, whole

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"name": "f", "description": "d", "input_schema": SCHEMA}
CHAT_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
HELLO = [{"role": "user", "content": "hi"}]
ASK: Json = {"model": "m", "max_tokens": 9, "messages": HELLO}


def refused(**fields: object) -> ApiError:
    with pytest.raises(ApiError) as raised:
        translated(MESSAGES, {**ASK, **fields})
    return raised.value


# -- requests ------------------------------------------------------------------------------------------------


def test_a_request_is_nearly_a_chat() -> None:
    assert chat_of(MESSAGES, ASK) == ASK


@pytest.mark.parametrize(
    ("fields", "chat"),
    [
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 4}, {"temperature": 0.5, "top_p": 0.9, "top_k": 4}),
        ({"stop_sequences": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop_sequences": []}, {}),
        ({"stream": True, "metadata": {"user_id": "u"}}, {"stream": True, "user": "u"}),
        ({"tools": [TOOL]}, {"tools": [CHAT_TOOL]}),
        ({"tools": [{**TOOL, "type": "custom"}]}, {"tools": [CHAT_TOOL]}),
        ({"tools": [TOOL], "tool_choice": {"type": "auto"}}, {"tools": [CHAT_TOOL], "tool_choice": "auto"}),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, {"tools": [CHAT_TOOL], "tool_choice": "required"}),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, {"tools": [CHAT_TOOL], "tool_choice": "none"}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True}},
            {"tools": [CHAT_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}},
             "parallel_tool_calls": False},
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "output", "schema": SCHEMA}},
             "reasoning_effort": "low"},
        ),
        ({"tool_choice": {"type": "auto"}}, {}),
        ({"tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
        ({"seed": 3, "ignore_eos": True}, {"seed": 3, "ignore_eos": True}),
        ({"thinking": {"type": "disabled"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}}, {}),
        ({"system": "s"}, {"messages": [{"role": "system", "content": "s"}, *HELLO]}),
        (
            {"system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}},
                        {"type": "text", "text": "t"}]},
            {"messages": [{"role": "system", "content": "s\n\nt"}, *HELLO]},
        ),
        ({"system": "", "tools": None, "stop_sequences": None, "metadata": None}, {}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_fields(fields: Json, chat: Json) -> None:
    assert chat_of(MESSAGES, {**ASK, **fields}) == {**ASK, **chat}


def test_blocks_become_messages() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "c"}, {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
            {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "two"}]},
            {"type": "text", "text": "d"},
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t3"}]},
        {"role": "user", "content": []},
    ]  # fmt: skip
    assert chat_of(MESSAGES, {**ASK, "messages": messages})["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
            {"id": "t2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ]},
        {"role": "tool", "tool_call_id": "t1", "content": "one"},
        {"role": "tool", "tool_call_id": "t2", "content": "two"},
        {"role": "user", "content": "d"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": ""},
    ]  # fmt: skip


def test_the_answer_continues_the_assistants_last_message() -> None:
    begun = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    found = chat_of(MESSAGES, {**ASK, "messages": begun})
    assert (found["continue_final_message"], found["add_generation_prompt"]) == (True, False)
    called = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
    assert "continue_final_message" not in chat_of(MESSAGES, {**ASK, "messages": [*HELLO, called]})
    shown = json.loads(translated(MESSAGES, {**ASK, "messages": begun}).tokenize_body())
    assert (shown["continue_final_message"], shown["add_generation_prompt"]) == (True, False)


RESULT = {"type": "tool_result", "tool_use_id": "t"}
IMAGE = {"type": "image", "source": {"type": "url", "url": "u"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens: is missing"),
        ({"messages": None}, "Expected `array`, got `null`"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: must be user, assistant or system"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: Expected `str | array`, got `int`"),
        ({"messages": [{"role": "user"}]}, "messages[0]: Object missing required field `content`"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type: 'image' is not supported"),
        (
            {"messages": [{"role": "user", "content": [{**RESULT, "content": [IMAGE]}]}]},
            "messages[0].content[0].content[0].type: 'image' is not supported; content is text here",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id: is missing",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].id: is"),
        ({"system": [{"type": "text", "text": None}]}, "system[0].text: is missing"),
        ({"system": [IMAGE]}, "system[0].type: 'image' is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type: 'web_search_20250305' is not"),
        ({"tools": [{"input_schema": {}}]}, "tools[0]: Object missing required field `name`"),
        ({"tools": [{"name": "f"}]}, "tools[0]: Object missing required field `input_schema`"),
        ({"tools": [{**TOOL, "name": ""}]}, "tools[0].name: Expected `str` of length >= 1"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema: is missing"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": 3}]}]},
            "messages[0].content[0].input: Expected `object | null`, got `int`",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f"}]}]},
            "messages[0].content[0].input: is missing",
        ),
        ({"tools": [3]}, "tools[0]: Expected `object`, got `int`"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type: must be auto, any, tool or none"),
        ({"tool_choice": "auto"}, "Expected `object | null`, got `str` - at `$.tool_choice`"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type: 'xml' is not supported"),
        ({"stop_sequences": "x"}, "Expected `array | null`, got `str` - at `$.stop_sequences`"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_supported_is_named(fields: Json, message: str) -> None:
    failure = refused(**fields)
    assert failure.status == 400
    assert message in failure.message


def test_tokens_are_counted_without_max_tokens() -> None:
    body = msgspec.json.encode({"messages": HELLO, "model": "m"})
    found = MESSAGES.translate(body, UnknownFields(), counting=True)
    assert json.loads(found.tokenize_body()) == {"model": "m", "messages": HELLO, "add_generation_prompt": True}


def test_unknown_fields_are_reported_or_refused() -> None:
    asked = {**ASK, "stop": "x", "container": "c", "thinking": {"type": "enabled", "budget_tokens": 1024}}
    assert translated(MESSAGES, asked).ignored == ["stop", "container", "thinking"]
    assert chat_of(MESSAGES, asked) == ASK
    with pytest.raises(ApiError, match="unknown field stop"):
        translated(MESSAGES, asked, refuse=True)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"messages": ' + b"[" * 5000, b'{"model": "\xff"}'])
def test_bodies_that_are_no_requests(body: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        MESSAGES.translate(body, UnknownFields())
    assert raised.value.status == 400


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (404, "not_found_error"),
     (413, "request_too_large"), (422, "invalid_request_error"), (429, "rate_limit_error"), (502, "api_error"),
     (503, "overloaded_error")],
)  # fmt: skip
def test_errors_have_the_apis_form(status: int, kind: str) -> None:
    told = json.loads(MESSAGES.error_body(ApiError(status, "stop: too many", param="stop"), "r1"))
    assert told == {
        "type": "error", "request_id": "r1", "error": {"type": kind, "message": "stop_sequences: too many"},
    }  # fmt: skip


# -- answers -------------------------------------------------------------------------------------------------


def put_together(found: list[Json]) -> Json:
    """The message that a client has from the events, checked at each step."""
    start, ping, *steps, delta, stop = found
    assert [one["type"] for one in (start, ping, delta, stop)] == [
        "message_start", "ping", "message_delta", "message_stop",
    ]  # fmt: skip
    message: Json = {**start["message"]}
    assert message["content"] == []
    inputs: dict[int, str] = {}
    open_block = False
    for event in steps:
        kind = event["type"].removeprefix("content_block_")
        if kind == "start":
            assert not open_block
            assert event["index"] == len(message["content"])
            message["content"].append({**event["content_block"]})
        assert event["index"] == len(message["content"]) - 1
        open_block = kind != "stop"
        block = message["content"][-1]
        if kind == "delta":
            ((name, more),) = ((n, text) for n, text in event["delta"].items() if n != "type")
            if name == "partial_json":
                inputs[event["index"]] = inputs.get(event["index"], "") + more
            else:
                block[name] += more
        elif kind == "stop" and block["type"] == "tool_use" and event["index"] in inputs:
            block["input"] = _object(inputs[event["index"]])
    assert not open_block
    return {**message, **delta["delta"], "usage": delta["usage"]}


def _object(text: str) -> object:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": text}


@given(outputs())
def test_a_stream_put_together_is_the_whole_answer(choices: list[Choice]) -> None:
    assert put_together(streamed(MESSAGES, ASK, choices)) == whole(MESSAGES, ASK, choices)


@given(outputs())
def test_what_was_answered_can_be_sent_back(choices: list[Choice]) -> None:
    content = whole(MESSAGES, ASK, choices)["content"]
    asked = {**ASK, "messages": [*HELLO, {"role": "assistant", "content": content}, *HELLO]}
    turns = chat_of(MESSAGES, asked)["messages"][1:-1]
    assert {turn["role"] for turn in turns} == {"assistant"}
    texts = [block["text"] for block in content if block["type"] == "text"]
    assert "".join(turn["content"] or "" for turn in turns) == "".join(texts)
    calls = [one for turn in turns for one in turn.get("tool_calls", [])]
    made = [block for block in content if block["type"] == "tool_use"]
    assert [(one["id"], json.loads(one["function"]["arguments"])) for one in calls] == [
        (block["id"], block["input"]) for block in made
    ]


@pytest.mark.parametrize(
    ("choices", "reason", "stop"),
    [
        ([part("stop", content="a")], "end_turn", None),
        ([part("length", content="a")], "max_tokens", None),
        ([part("stop", {"stop_reason": "END"}, content="a")], "stop_sequence", "END"),
        ([part("stop", {"stop_reason": "other"}, content="a")], "end_turn", None),
        ([part("stop", {"stop_reason": 7}, content="a")], "end_turn", None),
        ([call(0, "{}", "f"), part("tool_calls")], "tool_use", None),
        ([call(0, "{}", "f"), part("stop")], "tool_use", None),
        ([call(0, '{"a"', "f"), part("length")], "max_tokens", None),
        ([part("content_filter", content="a")], "refusal", None),
    ],
)
def test_why_a_message_ended(choices: list[Choice], reason: str, stop: str | None) -> None:
    asked = {**ASK, "stop_sequences": ["END"]}
    found = whole(MESSAGES, asked, choices)
    assert (found["stop_reason"], found["stop_sequence"]) == (reason, stop)
    assert put_together(streamed(MESSAGES, asked, choices)) == found


def test_the_form_of_a_message() -> None:
    choices = [part(reasoning="hm"), part(content="a"), call(0, '{"a": 1}', "f"), part("tool_calls")]
    assert whole(MESSAGES, ASK, choices) == {
        "id": "msg_r1", "type": "message", "role": "assistant", "model": "m",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "a"},
            {"type": "tool_use", "id": "call_0", "name": "f", "input": {"a": 1}},
        ],
        "stop_reason": "tool_use", "stop_sequence": None, "usage": {"input_tokens": 7, "output_tokens": 3},
    }  # fmt: skip


def test_the_prompts_tokens_are_told_at_the_start() -> None:
    [start, *_] = streamed(MESSAGES, ASK, [part("stop", content="a")])
    assert start["message"]["usage"] == {"input_tokens": 7, "output_tokens": 0}


def test_cached_tokens_are_counted_apart_from_the_start_to_the_end() -> None:
    rendering = translated(MESSAGES, ASK).rendering(Envelope("r1", True, "m", False, 100))
    begun = events(rendering.events(part("stop", content="a"), Counts(20, 0, 16)))
    ended = events(rendering.last_events(Counts(20, 3, 16)))
    assert begun[0]["message"]["usage"] == {"input_tokens": 4, "output_tokens": 0, "cache_read_input_tokens": 16}
    assert ended[-2]["usage"] == {"input_tokens": 4, "output_tokens": 3, "cache_read_input_tokens": 16}


def test_an_error_in_a_stream_is_its_last_event() -> None:
    rendering = translated(MESSAGES, ASK).rendering(Envelope("r1", True, "m", False, 100))
    begun = rendering.events(part(content="a"), Counts(7))
    last = events(begun + rendering.error_events(ApiError(502, "it failed", "server_error")))[-1]
    assert last == {"type": "error", "error": {"type": "api_error", "message": "it failed"}}
