"""OpenAI requests, checked before anything is computed."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field

import msgspec

from pdctl.engine.front.schemas import check_schema, narrowed
from pdctl.engine.front.tools import ToolFormat
from pdctl.engine.messages import Sampling
from pdctl.openai_api import ApiError, Envelope, decode_request, shown_number
from pdctl.wire import HandOver, Port

_MAX_STOPS = 16
# Each new token is looked for all of them.
_MAX_STOP_TEXT = 8192
_MAX_BIASES = 1024
# Characters of a schema, as JSON.
_MAX_GRAMMAR = 65_536


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`include_usage` adds a last chunk with the counts."""

    include_usage: bool = False


class OfferTo(msgspec.Struct, frozen=True):
    """The decode engine that may read the first chunks while the last ones are computed."""

    host: str
    port: Port


class HoldRequest(msgspec.Struct):
    """`kv_transfer_params` sent to a prefill engine, in vLLM's words plus `offer_to`."""

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    offer_to: OfferTo | None = None


class _Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chat completions share."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    resume_token_ids: list[int] | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    priority: int | None = None
    # What routers made for vLLM and SGLang add to every request.
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    return_hidden_states: bool | None = None

    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, object] | None = None


class CompletionBody(_Common, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[int | str | list[int]]
    max_tokens: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class ChatBody(_Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, object]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None


_decode_completion = msgspec.json.Decoder(CompletionBody).decode
_decode_chat = msgspec.json.Decoder(ChatBody).decode

# Fields that change the output and that this engine does not do: any value but these is refused, never ignored.
# Several answers are made of several requests by the proxy.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "skip_special_tokens": (None, True),
    "no_stop_trim": (None, False),
    "return_hidden_states": (None, False),
}


@dataclass(slots=True)
class GenerationRequest:
    """One checked request. `token_ids` is the prompt; `resume` are output tokens the client has already.

    `stages`: seconds its hand-over took so far, by part, for whoever asks where the time went.
    """

    request_id: str
    envelope: Envelope
    token_ids: list[int]
    sampling: Sampling
    stops: list[str]
    stream: bool
    include_usage: bool
    resume: list[int]
    hold: bool
    hand_over: HandOver | None
    offer_to: OfferTo | None = None
    router: str = "router"
    attempt: str = ""
    logprobs: int = -1
    tool_calls: ToolFormat = ToolFormat.NONE
    tenant: str = ""
    stages: dict[str, float] = field(default_factory=dict)


def parse_body(body: bytes, chat: bool) -> CompletionBody | ChatBody:
    """Decode and check what can be checked without a tokenizer. Raises ApiError."""
    parsed: CompletionBody | ChatBody
    parsed = decode_request(_decode_chat, body) if chat else decode_request(_decode_completion, body)
    for name, neutral in _NEUTRAL.items():
        value = getattr(parsed, name, None)
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in neutral):
            raise ApiError(400, f"{name} is not supported by this engine", param=name)
    _check_numbers(parsed)
    return parsed


def messages_of(messages: list[dict[str, object]]) -> list[dict[str, object]]:
    """A chat's messages with their content as text, which is what templates take. Raises ApiError."""
    if not messages:
        raise ApiError(400, "messages is empty", param="messages")
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ApiError(400, f"messages[{number}] has no role", param="messages")
        found.append({**message, "content": _text(message.get("content"), number)})
    return found


def _text(content: object, number: int) -> str | None:
    """A string, nothing (beside tool calls), or text parts put together."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        message = f"messages[{number}].content must be a string or a list of text parts"
        raise ApiError(400, message, param="messages")
    return "".join(map(str, texts))


def _check_numbers(body: CompletionBody | ChatBody) -> None:
    checks: list[tuple[str, float | None, float, float]] = [
        ("temperature", body.temperature, 0.0, 100.0),
        ("top_p", body.top_p, 5e-324, 1.0),
        ("top_k", body.top_k, -1, 2**31),
        ("max_tokens", body.max_tokens, 1, 2**31),
        ("max_completion_tokens", getattr(body, "max_completion_tokens", None), 1, 2**31),
        ("seed", body.seed, -(2**63), 2**63 - 1),
        ("presence_penalty", body.presence_penalty, -2, 2),
        ("frequency_penalty", body.frequency_penalty, -2, 2),
        ("repetition_penalty", body.repetition_penalty, 1e-3, 100),
        ("min_p", body.min_p, 0, 1),
        ("min_tokens", body.min_tokens, 0, 2**31),
        ("top_logprobs", getattr(body, "top_logprobs", None), 0, 20),
        ("logprobs", body.logprobs if isinstance(body, CompletionBody) else None, 0, 20),
    ]
    for name, value, low, high in checks:
        if value is not None and not low <= value <= high:
            bounds = f"from {_bound(low)} to {_bound(high)}"
            raise ApiError(400, f"{name} must be {bounds}; it is {shown_number(value)}", param=name)


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def stop_strings(body: CompletionBody | ChatBody) -> list[str]:
    """The stop strings as a list. Raises ApiError."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > _MAX_STOPS or not all(stops) or sum(map(len, stops)) > _MAX_STOP_TEXT:
        message = f"stop takes up to {_MAX_STOPS} strings, none of them empty, {_MAX_STOP_TEXT} characters together"
        raise ApiError(400, message, param="stop")
    return stops


def sampling_of(body: CompletionBody | ChatBody, prompt_len: int, max_model_len: int, vocab_size: int) -> Sampling:
    """Sampling with OpenAI's defaults. Raises ApiError when prompt and output do not fit the context."""
    wanted = _max_tokens(body, prompt_len, max_model_len)
    if body.min_tokens is not None and body.min_tokens > wanted:
        raise ApiError(400, f"min_tokens = {body.min_tokens} is more than max_tokens = {wanted}", param="min_tokens")
    return Sampling(
        max_tokens=wanted,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
        ignore_eos=bool(body.ignore_eos),
        min_p=body.min_p or 0.0,
        min_tokens=body.min_tokens or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_biases(body.logit_bias or {}, vocab_size),
        logprobs=_logprobs(body),
        grammar=grammar_of(body) if isinstance(body, ChatBody) else _format_grammar(body.response_format),
    )


def _max_tokens(body: CompletionBody | ChatBody, prompt_len: int, max_model_len: int) -> int:
    room = max_model_len - prompt_len
    if room < 1:
        raise ApiError(
            400,
            f"this model's context is {max_model_len} tokens, prompt and output together; the prompt alone has "
            f"{prompt_len}",
            param="messages" if isinstance(body, ChatBody) else "prompt",
        )
    wanted = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if wanted is None:
        wanted = room if isinstance(body, ChatBody) else min(16, room)
    if wanted > room:
        raise ApiError(
            400,
            f"this model's context is {max_model_len} tokens; {prompt_len} in the prompt and {wanted} asked for "
            f"make {prompt_len + wanted}",
            param="max_tokens",
        )
    return int(wanted)


def _logprobs(body: CompletionBody | ChatBody) -> int:
    if isinstance(body, ChatBody):
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs")
        return (body.top_logprobs or 0) if body.logprobs else -1
    return -1 if body.logprobs is None else body.logprobs


def _biases(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    if len(given) > _MAX_BIASES:
        raise ApiError(400, f"logit_bias takes up to {_MAX_BIASES} tokens; it has {len(given)}", param="logit_bias")
    found = {}
    for word, bias in given.items():
        if not word.isdecimal() or len(word) > 10 or int(word) >= vocab_size or not -100 <= bias <= 100:
            message = f"logit_bias maps token ids from 0 to {vocab_size - 1} to numbers from -100 to 100"
            raise ApiError(400, message, param="logit_bias")
        found[int(word)] = bias
    return found


# -- guided output and tools -------------------------------------------------------------------------------


def tool_format(body: CompletionBody | ChatBody) -> ToolFormat:
    """How tool calls appear in the output. Raises ApiError."""
    if not isinstance(body, ChatBody):
        return ToolFormat.NONE
    if not body.tools:
        if body.tool_choice not in (None, "none"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return ToolFormat.NONE
    for tool in body.tools:
        _function(tool)
    if body.tool_choice == "none":
        return ToolFormat.NONE
    return ToolFormat.TAGGED if body.tool_choice in (None, "auto") else ToolFormat.FORCED


def grammar_of(body: ChatBody) -> str:
    """What the output must match: a tool call where one is demanded, else the response format."""
    if tool_format(body) is ToolFormat.FORCED:
        return _bounded(json.dumps({"json": narrowed(_call_schema(body))}), "tools")
    return _format_grammar(body.response_format)


def _format_grammar(given: dict[str, object] | None) -> str:
    kind = (given or {"type": "text"}).get("type")
    if given is None or kind == "text":
        return ""
    if kind == "json_object":
        return json.dumps({"json": True})
    wanted = given.get("json_schema")
    if kind != "json_schema" or not isinstance(wanted, dict) or not isinstance(wanted.get("schema"), dict):
        message = "response_format must be text, json_object, or json_schema with json_schema.schema"
        raise ApiError(400, message, param="response_format")
    return schema_grammar(wanted["schema"], "response_format", "json_schema.schema")


def schema_grammar(schema: object, param: str, where: str = "") -> str:
    """The grammar of a JSON Schema. Raises ApiError for one that answers might break."""
    check_schema(schema, param, where)
    return _bounded(json.dumps({"json": narrowed(schema)}), param)


def _bounded(grammar: str, param: str) -> str:
    if len(grammar) > _MAX_GRAMMAR:
        raise ApiError(400, f"the schema is {len(grammar)} characters long; {_MAX_GRAMMAR} is the most", param=param)
    return grammar


def _call_schema(body: ChatBody) -> dict[str, object]:
    """One call of one of the tools, or of the one that tool_choice names."""
    functions = [_function(tool) for tool in body.tools or []]
    if isinstance(body.tool_choice, dict):
        named = _function(body.tool_choice).get("name")
        functions = [function for function in functions if function["name"] == named]
    if not functions or (isinstance(body.tool_choice, str) and body.tool_choice != "required"):
        raise ApiError(400, "tool_choice must be none, auto, required, or name one of the tools", param="tool_choice")
    for function in functions:
        parameters = function.get("parameters")
        if parameters is not None:
            check_schema(parameters, "tools", f"{function['name']}.parameters")
    each = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in functions
    ]
    return each[0] if len(each) == 1 else {"anyOf": each}


def _function(tool: dict[str, object]) -> dict[str, object]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, "a tool is {type: function, function: {name, parameters}}", param="tools")
    return function
