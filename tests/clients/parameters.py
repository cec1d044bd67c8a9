"""Every parameter of the official client for chats and completions, with good and bad values."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from openai.resources.chat.completions import Completions as Chats
from openai.resources.completions import Completions

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
# Of the client itself: they are no fields of a request.
_CLIENTS_OWN = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@dataclass(frozen=True)
class Parameter:
    """`good` values are honoured, or have no effect by their meaning; `bad` ones get 400 with the parameter's name.

    `beside`: other parameters that a value needs.
    """

    good: list[Any]
    bad: list[Any]
    beside: dict[str, Any] = field(default_factory=dict)


BOTH: dict[str, Parameter] = {
    "model": Parameter(["m"], [7]),
    "frequency_penalty": Parameter([-2, 0.5, 2, None], [-2.1, 2.1, "high"]),
    "presence_penalty": Parameter([-2, 0.5, 2, None], [-2.1, 2.1, "high"]),
    "logit_bias": Parameter([{"70": 1}, {}, None], [{"70": 101}, {"x": 1}, {"99999": 1}, [70]]),
    "max_tokens": Parameter([1, 4], [0, -1, 10**6, "4"]),
    "n": Parameter([1, 2, None], [0, 129, "2"]),
    "seed": Parameter([0, -5, None], ["s", 2**64]),
    "stop": Parameter(["a", ["a", "b"], None], [[""], ["x"] * 17, 7]),
    "stream": Parameter([True, False, None], ["yes"]),
    "stream_options": Parameter([{"include_usage": True}, {"include_obfuscation": False}], [7, {"include_usage": 3}],
                                {"stream": True}),
    "temperature": Parameter([0, 2, None], [-0.1, "hot"]),
    "top_p": Parameter([0.1, 1, None], [0, 1.1, "p"]),
    "user": Parameter(["u", None], [7]),
}  # fmt: skip
CHAT: dict[str, Parameter] = {
    **BOTH,
    "messages": Parameter(
        [[{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "developer", "content": "a"}]],
        [[], [{"content": "a"}], "hello", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]],
    ),
    "audio": Parameter([None], [{"voice": "alloy", "format": "wav"}]),
    "function_call": Parameter(["none", None], ["auto", {"name": "f"}]),
    "functions": Parameter([None, []], [[{"name": "f", "parameters": {}}]]),
    "logprobs": Parameter([True, False, None], ["yes", 3]),
    "top_logprobs": Parameter([0, 3], [-1, 21, "x"], {"logprobs": True}),
    "max_completion_tokens": Parameter([1, 4], [0, -1, 10**6, "4"]),
    "metadata": Parameter([{"a": "b"}, None], [{"a": 1}, "a"]),
    "modalities": Parameter([["text"], None], [["audio"], ["text", "audio"], "text"]),
    "moderation": Parameter([None], [{"model": "omni-moderation-latest"}]),
    "parallel_tool_calls": Parameter([True, False], ["no"], {"tools": [TOOL]}),
    "prediction": Parameter([None], [{"type": "content", "content": "a"}]),
    "prompt_cache_key": Parameter(["k", None], [7]),
    "prompt_cache_options": Parameter([{}, None], [7]),
    "prompt_cache_retention": Parameter(["24h", "in_memory", None], ["forever", 7]),
    "reasoning_effort": Parameter(["none", "minimal", "low", "medium", "high", "xhigh", None], ["much", 7]),
    "response_format": Parameter(
        [{"type": "text"}, {"type": "json_object"}, None], [{"type": "xml"}, {"type": "json_schema"}, "json"]
    ),
    "safety_identifier": Parameter(["s", None], [7]),
    "service_tier": Parameter(["auto", "default", None], ["flex", "priority", 7]),
    "store": Parameter([False, None], [True, "no"]),
    "tool_choice": Parameter(
        ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
        ["sometimes", {"type": "function", "function": {"name": "g"}}, 7, {"type": "allowed_tools"}],
        {"tools": [TOOL]},
    ),
    "tools": Parameter([[TOOL], [], None], [[{"type": "custom", "custom": {"name": "f"}}], [{}], 7]),
    "verbosity": Parameter(["low", "medium", "high", None], ["none", 7]),
    "web_search_options": Parameter([None], [{}]),
}
TEXT: dict[str, Parameter] = {
    **BOTH,
    "prompt": Parameter(["a", ["a", "b"], [70, 71], [[70], [71]]], [7, [], "", [10**6], [-1], [{}]]),
    "best_of": Parameter([1, None], [0, 2, "2"]),
    "echo": Parameter([True, False, None], ["yes"]),
    "logprobs": Parameter([0, 5, None], [-1, 21, "x"]),
    "suffix": Parameter(["", None], ["z"]),
}


def of_client(kind: type[Chats] | type[Completions]) -> set[str]:
    """The parameters that the installed client has."""
    return set(inspect.signature(kind.create).parameters) - _CLIENTS_OWN


def cases(table: dict[str, Parameter], good: bool) -> list[tuple[str, dict[str, Any]]]:
    """(parameter, request fields) of each value."""
    return [
        (name, {**parameter.beside, name: value})
        for name, parameter in table.items()
        for value in (parameter.good if good else parameter.bad)
    ]
