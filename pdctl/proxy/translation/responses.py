"""OpenAI's Responses: requests as chat requests. Stateless: nothing is stored, so nothing can be referred to."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pdctl.net.openai.api import ApiError, Envelope, decode_request
from pdctl.proxy.client.requests import check_encoding
from pdctl.proxy.client.unknown_fields import UnknownFields
from pdctl.proxy.translation.api import PASSED, Json, Translated, renamed
from pdctl.proxy.translation.conversation import (
    Conversation,
    Name,
    given,
    needed,
    read,
    read_text,
    shown,
    unsupported,
    wrong,
)
from pdctl.proxy.translation.response_answer import ResponseAnswer

_NULL = msgspec.Raw(b"null")
_LOGPROBS = "message.output_text.logprobs"

# Chat fields and the fields of this API that they come from, for errors.
_NAMES = {
    "messages": "input", "max_completion_tokens": "max_output_tokens", "max_tokens": "max_output_tokens",
    "response_format": "text.format", "reasoning_effort": "reasoning.effort", "verbosity": "text.verbosity",
}  # fmt: skip
# Fields with the same meaning in a chat.
_SAME = (
    "model", "stream", "temperature", "top_p", "parallel_tool_calls", "metadata", "user", "service_tier",
    "safety_identifier", "prompt_cache_key",
)  # fmt: skip
# Fields that the answer repeats.
_ECHOED = (
    "instructions", "max_output_tokens", "max_tool_calls", "temperature", "top_p", "user", "service_tier",
    "safety_identifier", "prompt_cache_key",
)  # fmt: skip
# Why a value that needs state, or a service beside the model, is refused; each value that is accepted.
_STATE = "this service stores no responses: send the whole conversation as input"
_REFUSED: dict[str, tuple[str, tuple[bytes, ...]]] = {
    "store": (f"store = true is not supported: {_STATE}", (b"null", b"false")),
    "previous_response_id": (f"previous_response_id is not supported: {_STATE}", (b"null",)),
    "conversation": (f"conversation is not supported: {_STATE}", (b"null",)),
    "background": ("background = true is not supported: responses are answered at once", (b"null", b"false")),
    "prompt": ("prompt templates are not supported: send instructions and input", (b"null",)),
    "truncation": ("truncation is not supported, except disabled", (b"null", b'"disabled"')),
    "context_management": ("context_management is not supported: the input is used as it is", (b"null", b"[]")),
    "moderation": ("moderation is not supported", (b"null",)),
}


class _Text(msgspec.Struct):
    format: dict[str, msgspec.Raw] | None = None
    verbosity: str | None = None


class _Reasoning(msgspec.Struct):
    effort: str | None = None


class _Body(msgspec.Struct):
    """The fields of a request that are read here. Those whose place or meaning is the same in a chat are typed only to
    name them in errors."""

    input: msgspec.Raw = _NULL
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    stream_options: dict[str, msgspec.Raw] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, msgspec.Raw]] | None = None
    tool_choice: msgspec.Raw = _NULL
    parallel_tool_calls: bool | None = None
    text: _Text | None = None
    reasoning: _Reasoning | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class _Part(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class _Item(msgspec.Struct):
    """An input item of any type that is supported."""

    type: str | None = None
    role: str | None = None
    content: str | list[_Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[_Part] | None = None


class _Tool(msgspec.Struct):
    name: Name
    description: str | None = None
    parameters: dict[str, msgspec.Raw] | None = None
    strict: bool | None = None


class _Choice(msgspec.Struct):
    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[dict[str, msgspec.Raw]] | None = None


class _Schema(msgspec.Struct):
    """A text's format by a JSON Schema."""

    name: str
    schema: dict[str, msgspec.Raw]
    description: str | None = None
    strict: bool | None = None


_KNOWN = frozenset({*_Body.__struct_fields__, *_REFUSED, *PASSED})
_INSIDE: dict[str, frozenset[str]] = {
    "text": frozenset(_Text.__struct_fields__),
    "reasoning": frozenset(_Reasoning.__struct_fields__),
    "stream_options": frozenset({"include_obfuscation"}),
}

_decode_body = msgspec.json.Decoder(_Body).decode
_decode_item = msgspec.json.Decoder(_Item).decode
_decode_tool = msgspec.json.Decoder(_Tool).decode
_decode_schema = msgspec.json.Decoder(_Schema).decode
_decode_choice = msgspec.json.Decoder(_Choice).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode

Fields = Mapping[str, msgspec.Raw]


class Responses:
    """See Api."""

    path = "/v1/responses"
    count_path = "/v1/responses/input_tokens"
    id_header: bytes | None = None

    def translate(self, body: bytes, unknown: UnknownFields, counting: bool = False) -> Translated:
        """See Api.translate."""
        check_encoding(body)
        known, fields = decode_request(_decode_body, body), decode_request(_decode_fields, body)
        _check(fields)
        ignored = _unknown(fields, unknown)
        tools, choice = _tools(known)
        chat: Json = {name: fields[name] for name in (*_SAME, *PASSED) if name in fields}
        chat |= _limits(known) | _text(known) | _logprobs(known)
        if tools:
            chat["tools"] = [_as_chat_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
        # Without tools, these two say nothing; engines refuse any choice.
        if choice is not None and (tools or choice not in ("auto", "none")):
            chat["tool_choice"] = choice
        chat["messages"] = _messages(known)
        echo = _echo(known, fields)
        in_order = bool(tools) and choice != "none"

        def rendering(envelope: Envelope) -> ResponseAnswer:
            return ResponseAnswer(envelope, echo)

        return Translated(chat, ignored, in_order, rendering)

    def counted(self, tokens: int) -> bytes:
        """See Api.counted."""
        return _encode({"object": "response.input_tokens", "input_tokens": tokens})

    def error_body(self, failure: ApiError, request_id: str) -> bytes:
        """See Api.error_body."""
        return renamed(failure, _NAMES).body()


RESPONSES = Responses()


def _check(fields: Fields) -> None:
    """Raise ApiError for fields that cannot be supported."""
    for name, (message, accepted) in _REFUSED.items():
        if bytes(fields.get(name, _NULL)) not in accepted:
            raise ApiError(400, message, param=name)
    options, stream = (bytes(fields.get(name, _NULL)) for name in ("stream_options", "stream"))
    if options != b"null" and stream != b"true":
        raise ApiError(400, "stream_options needs stream = true", param="stream_options")


def _unknown(fields: Fields, unknown: UnknownFields) -> list[str]:
    """The names of fields without effect, also of those within other fields."""
    found = unknown.of(fields, _KNOWN)
    for name, known in _INSIDE.items():
        if name in fields and bytes(fields[name]) != b"null":
            found += [f"{name}.{inner}" for inner in unknown.of(_decode_fields(fields[name]), known)]
    return found


def _limits(known: _Body) -> Json:
    return {} if known.max_output_tokens is None else {"max_completion_tokens": known.max_output_tokens}


def _text(known: _Body) -> Json:
    """The format of the text, and how much there is to be of it."""
    found: Json = {}
    if known.reasoning is not None and known.reasoning.effort is not None:
        found["reasoning_effort"] = known.reasoning.effort
    if known.text is None:
        return found
    if known.text.verbosity is not None:
        found["verbosity"] = known.text.verbosity
    if known.text.format is not None:
        kind = read(read_text, known.text.format.get("type", _NULL), "text.format.type")
        if kind not in ("text", "json_object", "json_schema"):
            raise wrong("text.format.type", f"must be text, json_object or json_schema; it is {shown(kind)}")
        if kind == "json_schema":
            schema = read(_decode_schema, _encode(known.text.format), "text.format")
            found["response_format"] = {"type": kind, "json_schema": given(schema)}
        elif kind == "json_object":
            found["response_format"] = {"type": kind}
    return found


def _logprobs(known: _Body) -> Json:
    found: Json = {}
    if known.top_logprobs or _LOGPROBS in (known.include or ()):
        found["logprobs"] = True
    if known.top_logprobs:
        found["top_logprobs"] = known.top_logprobs
    return found


def _echo(known: _Body, fields: Fields) -> Json:
    """The part of the answer that repeats the request."""
    echo: Json = {name: fields.get(name) for name in _ECHOED}
    kinds = known.text.format if known.text and known.text.format else {"type": "text"}
    return {
        **echo,
        "metadata": known.metadata or {},
        "parallel_tool_calls": known.parallel_tool_calls is not False,
        "reasoning": {"effort": known.reasoning.effort if known.reasoning else None, "summary": None},
        "text": {"format": kinds, **({"verbosity": known.text.verbosity} if known.text else {})},
        "tool_choice": "auto" if bytes(known.tool_choice) == b"null" else known.tool_choice,
        "tools": [{"parameters": None, "strict": None, **tool} for tool in known.tools or []],
        "top_logprobs": known.top_logprobs or 0,
    }


# -- tools ---------------------------------------------------------------------------------------------------


def _tools(known: _Body) -> tuple[list[dict[str, msgspec.Raw]], object]:
    """The tools that the model may call, and the chat's tool_choice."""
    tools = known.tools or []
    if bytes(known.tool_choice) == b"null":
        return tools, None
    if bytes(known.tool_choice).startswith(b'"'):
        word = read(read_text, known.tool_choice, "tool_choice")
        if word not in ("none", "auto", "required"):
            raise wrong("tool_choice", f"must be none, auto, required or an object; it is {shown(word)}")
        return tools, word
    choice = read(_decode_choice, known.tool_choice, "tool_choice")
    if choice.type == "function":
        return tools, {"type": "function", "function": {"name": choice.name}}
    if choice.type == "allowed_tools":
        names = {_name(tool, "tool_choice.tools") for tool in choice.tools or []}
        return [tool for tool in tools if _name(tool, "tools") in names], choice.mode or "auto"
    raise unsupported("tool_choice.type", choice.type, "these are: function, allowed_tools")


def _name(tool: Fields, place: str) -> str:
    return read(read_text, tool.get("name", _NULL), f"{place}.name")


def _as_chat_tool(tool: dict[str, msgspec.Raw], place: str) -> Json:
    kind = read(read_text, tool.get("type", _NULL), f"{place}.type")
    if kind != "function":
        raise unsupported(f"{place}.type", kind, "tools are functions, which the client runs itself")
    return {"type": "function", "function": given(read(_decode_tool, _encode(tool), place))}


# -- input ---------------------------------------------------------------------------------------------------


def _messages(known: _Body) -> list[Json]:
    chat = Conversation()
    if known.instructions:
        chat.system(known.instructions)
    if bytes(known.input).startswith(b'"'):
        chat.user([read(read_text, known.input, "input")])
        return chat.messages
    if not bytes(known.input).startswith(b"["):
        raise wrong("input", "must be a string or a list of items")
    for number, raw in enumerate(_decode_items(known.input)):
        place = f"input[{number}]"
        _add(chat, read(_decode_item, raw, place), place)
    return chat.messages


def _add(chat: Conversation, item: _Item, place: str) -> None:
    """Add an item to the chat. Raises ApiError."""
    kind = item.type or "message"
    if kind == "message":
        _add_message(chat, item, place)
    elif kind == "function_call":
        call_id, name = needed(item.call_id, place, "call_id"), needed(item.name, place, "name")
        if item.arguments is None:
            raise wrong(f"{place}.arguments", "is missing")
        chat.call(call_id, name, item.arguments or "{}")
    elif kind == "function_call_output":
        texts = _texts(item.output, f"{place}.output", ("input_text", "output_text"))
        chat.tool(needed(item.call_id, place, "call_id"), texts)
    elif kind == "reasoning":
        # Reasoning that a provider encrypted, or a summary of it, is for that provider only.
        texts = [] if item.content is None else _texts(item.content, f"{place}.content", ("reasoning_text",))
        if text := "".join(texts):
            chat.reasoning(text)
    elif kind == "item_reference":
        raise wrong(f"{place}.type", f"item_reference is not supported: {_STATE}")
    else:
        these = "these items are: message, function_call, function_call_output, reasoning"
        raise unsupported(f"{place}.type", kind, these)


def _add_message(chat: Conversation, item: _Item, place: str) -> None:
    texts = _texts(item.content, f"{place}.content", ("input_text", "output_text", "text", "refusal"))
    if item.role in ("system", "developer"):
        chat.system("".join(texts))
    elif item.role == "user":
        chat.user(texts)
    elif item.role == "assistant":
        chat.assistant("".join(texts))
    else:
        raise wrong(f"{place}.role", "must be user, assistant, system or developer")


def _texts(content: str | list[_Part] | None, place: str, kinds: tuple[str, ...]) -> list[str]:
    if content is None:
        raise wrong(place, "is missing")
    if isinstance(content, str):
        return [content]
    texts = []
    for number, part in enumerate(content):
        if part.type not in kinds:
            raise unsupported(f"{place}[{number}].type", part.type, f"content is text here: {', '.join(kinds)}")
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            raise wrong(f"{place}[{number}].text", "is missing")
        texts.append(text)
    return texts
