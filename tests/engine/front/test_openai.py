from __future__ import annotations

import json

import pytest

from pdctl.engine.front.api.messages import messages_of
from pdctl.engine.front.api.openai import bad_words, parse_body, sampling_of, stop_strings, template_variables
from pdctl.net.openai.api import ApiError
from pdctl.net.openai.fields import ChatBody


def refused(body: object, chat: bool = False) -> ApiError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as found:
        parsed = parse_body(raw, chat)
        stop_strings(parsed)
        bad_words(parsed)
        sampling_of(parsed, 10, 100, 384)
    return found.value


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": -1}, {"max_tokens": 0}, {"max_tokens": "5"}, {"max_tokens": 91}, {"temperature": -0.1},
        {"top_p": 0}, {"top_p": 1.1}, {"top_k": -2}, {"stop": [""]}, {"stop": ["x"] * 17}, {"n": 2}, {"best_of": 2},
        {"bad_words": [" "]}, {"bad_words": ["x"] * 129}, {"prompt_logprobs": 21},
        {"logprobs": 21}, {"logprobs": -1}, {"min_p": 1.5}, {"min_tokens": 50},
        {"suffix": "x"}, {"presence_penalty": 2.5}, {"logit_bias": {"1": 200}}, {"logit_bias": {"999": 2}},
        {"repetition_penalty": 0}, {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"unknown": 1}, {"stream_options": {"odd": True}},
        {"prompt": 5}, {"prompt": {"a": 1}}, {"stream": "yes"},
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_400_and_a_name(field: dict[str, object]) -> None:
    failure = refused({"prompt": "x", **field})
    assert failure.status == 400
    assert next(iter(field)) in failure.message or failure.param == next(iter(field))
    assert json.loads(failure.body())["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"prompt": "\xff"}', b"{}"])
def test_bodies_that_are_no_request(raw: bytes) -> None:
    assert refused(raw).status == 400


def test_neutral_values_of_unsupported_fields_pass() -> None:
    body = {
        "prompt": "x",
        "n": 1,
        "echo": False,
        "logprobs": None,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "u",
    }
    assert parse_body(json.dumps(body).encode(), chat=False).user == "u"


def test_defaults_are_openais() -> None:
    completion = sampling_of(parse_body(b'{"prompt": "x"}', chat=False), 10, 100, 384)
    chat = sampling_of(parse_body(b'{"messages": []}', chat=True), 10, 100, 384)
    assert (completion.max_tokens, completion.temperature, completion.top_p) == (16, 1.0, 1.0)
    assert chat.max_tokens == 90
    assert sampling_of(parse_body(b'{"prompt": "x"}', chat=False), 95, 100, 384).max_tokens == 5


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(ApiError, match="context is 100 tokens"):
        sampling_of(parse_body(b'{"prompt": "x"}', chat=False), 100, 100, 384)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    "field",
    [
        {"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21},
        {"tools": [{"type": "x"}], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": "sometimes"}, {"store": True}, {"service_tier": "flex"},
        {"functions": [{"name": "f"}]}, {"audio": {}}, {"prediction": {}}, {"web_search_options": {}},
        {"moderation": {}}, {"verbosity": "none"}, {"reasoning_effort": "much"}, {"function_call": "auto"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    ],
)  # fmt: skip
def test_bad_values_of_chats(field: dict[str, object]) -> None:
    assert refused({"messages": [], **field}, chat=True).status == 400


def test_a_demanded_tool_call_is_a_grammar() -> None:
    body = {"messages": [], "tools": [TOOL], "tool_choice": "required"}
    found = sampling_of(parse_body(json.dumps(body).encode(), chat=True), 10, 100, 384)
    assert json.loads(found.grammar)["json"]["properties"]["name"] == {"const": "f"}
    free = sampling_of(parse_body(json.dumps({**body, "tool_choice": "auto"}).encode(), chat=True), 10, 100, 384)
    assert free.grammar == ""


def test_a_chat_without_a_message_is_refused() -> None:
    with pytest.raises(ApiError, match="messages is empty"):
        messages_of([])
    assert messages_of([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}), ({"verbosity": "low"}, {"verbosity": "low"}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high", "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
         {"reasoning_effort": "none", "enable_thinking": True}),
    ],
)  # fmt: skip
def test_templates_are_told_how_much_to_think(fields: dict[str, object], variables: dict[str, object]) -> None:
    parsed = parse_body(json.dumps({"messages": [], **fields}).encode(), chat=True)
    assert isinstance(parsed, ChatBody)
    assert template_variables(parsed) == variables
