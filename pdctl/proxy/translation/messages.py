"""Anthropic's Messages: requests as chat requests."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pdctl.net.openai.api import ApiError, Envelope, decode_request
from pdctl.proxy.client.requests import check_encoding
from pdctl.proxy.client.unknown_fields import UnknownFields
from pdctl.proxy.translation.api import PASSED, Json, Translated, renamed
from pdctl.proxy.translation.conversation import Conversation, Name, given, needed, read, read_text, unsupported, wrong
from pdctl.proxy.translation.message_answer import MessageAnswer, error_of

_NULL = msgspec.Raw(b"null")

# Chat fields and the fields of this API that they come from, for errors.
_NAMES = {
    "stop": "stop_sequences", "response_format": "output_config.format", "reasoning_effort": "output_config.effort",
    "user": "metadata.user_id",
}  # fmt: skip
# Fields with the same meaning in a chat, and those that are passed on under their own names. This API has its own name
# for stop strings.
_SAME = ("model", "stream", "max_tokens", "temperature", "top_p", *(name for name in PASSED if name != "stop"))
# Fields that say how the provider is to bill, cache or place a request: they do not change the answer.
_NO_EFFECT = ("cache_control", "service_tier", "inference_geo", "speed", "user_profile_id", "workspace_id")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_TEXT_ONLY = "content is text here"


class _Metadata(msgspec.Struct):
    user_id: str | None = None


class _Format(msgspec.Struct):
    type: str
    schema: dict[str, msgspec.Raw] | None = None


class _OutputConfig(msgspec.Struct):
    format: _Format | None = None
    effort: str | None = None


class _Choice(msgspec.Struct):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Tool(msgspec.Struct):
    name: Name
    input_schema: dict[str, msgspec.Raw]
    description: str | None = None
    strict: bool | None = None


class _Thinking(msgspec.Struct):
    type: str


class _Block(msgspec.Struct):
    """A content block of any type that is supported."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, msgspec.Raw] | None = None
    tool_use_id: str | None = None
    content: msgspec.Raw = _NULL


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Block]


class _Body(msgspec.Struct):
    """The fields of a request that are read here, or typed to name them in errors."""

    messages: list[msgspec.Raw]
    model: str | None = None
    max_tokens: int | None = None
    system: msgspec.Raw = _NULL
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[msgspec.Raw] | None = None
    tool_choice: _Choice | None = None
    metadata: _Metadata | None = None
    output_config: _OutputConfig | None = None
    thinking: _Thinking | None = None


_KNOWN = frozenset({*_Body.__struct_fields__, *_NO_EFFECT, *_SAME})

_decode_body = msgspec.json.Decoder(_Body).decode
_decode_tool = msgspec.json.Decoder(_Tool).decode
_decode_message = msgspec.json.Decoder(_Message).decode
_decode_content = msgspec.json.Decoder(str | list[_Block]).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode

Fields = Mapping[str, msgspec.Raw]


class Messages:
    """See Api."""

    path = "/v1/messages"
    count_path = "/v1/messages/count_tokens"
    id_header: bytes | None = b"request-id"

    def translate(self, body: bytes, unknown: UnknownFields, counting: bool = False) -> Translated:
        """See Api.translate."""
        check_encoding(body)
        known, fields = decode_request(_decode_body, body), decode_request(_decode_fields, body)
        if known.max_tokens is None and not counting:
            raise wrong("max_tokens", "is missing")
        ignored = unknown.of(fields, _KNOWN) + _thinking(known, unknown)
        chat: Json = {name: fields[name] for name in _SAME if name in fields}
        chat |= _output(known) | _tools(known)
        stops = known.stop_sequences or []
        if stops:
            chat["stop"] = stops
        if known.metadata and known.metadata.user_id is not None:
            chat["user"] = known.metadata.user_id
        chat["messages"] = messages = _messages(known)
        if messages and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
            # As in this API: the answer continues the assistant's last message.
            chat |= {"continue_final_message": True, "add_generation_prompt": False}
        in_order = "tools" in chat and chat.get("tool_choice") != "none"

        def rendering(envelope: Envelope) -> MessageAnswer:
            return MessageAnswer(envelope, frozenset(stops))

        return Translated(chat, ignored, in_order, rendering)

    def counted(self, tokens: int) -> bytes:
        """See Api.counted."""
        return _encode({"input_tokens": tokens})

    def error_body(self, failure: ApiError, request_id: str) -> bytes:
        """See Api.error_body."""
        return _encode({**error_of(renamed(failure, _NAMES)), "request_id": request_id})


MESSAGES = Messages()


def _thinking(known: _Body, unknown: UnknownFields) -> list[str]:
    """Whether to think is for the model's chat template: `chat_template_kwargs` can say so."""
    if known.thinking is None or known.thinking.type == "disabled":
        return []
    return unknown.of(["thinking"], frozenset())


def _output(known: _Body) -> Json:
    found: Json = {}
    config = known.output_config
    if config is not None and config.effort is not None:
        found["reasoning_effort"] = config.effort
    if config is not None and config.format is not None:
        if config.format.type != "json_schema":
            raise unsupported("output_config.format.type", config.format.type, "it must be json_schema")
        if config.format.schema is None:
            raise wrong("output_config.format.schema", "is missing")
        schema = {"name": "output", "schema": config.format.schema}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    return found


# -- tools ---------------------------------------------------------------------------------------------------


def _tools(known: _Body) -> Json:
    found: Json = {}
    if known.tools:
        found["tools"] = [_as_chat_tool(raw, f"tools[{number}]") for number, raw in enumerate(known.tools)]
    choice = known.tool_choice
    if choice is None:
        return found
    if choice.type == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice.type not in _CHOICES:
        raise wrong("tool_choice.type", "must be auto, any, tool or none")
    elif known.tools or choice.type == "any":
        # Without tools, the other two say nothing; engines refuse any choice.
        found["tool_choice"] = _CHOICES[choice.type]
    if choice.disable_parallel_tool_use:
        found["parallel_tool_calls"] = False
    return found


def _as_chat_tool(raw: msgspec.Raw, place: str) -> Json:
    # A tool of the provider may lack fields that functions have: look at its type first.
    kind = _decode_fields(raw).get("type", _NULL) if bytes(raw).startswith(b"{") else _NULL
    if bytes(kind) not in (b"null", b'"custom"'):
        named = read(read_text, kind, f"{place}.type")
        raise unsupported(f"{place}.type", named, "tools are custom, which the client runs itself")
    function = given(read(_decode_tool, raw, place))
    function["parameters"] = function.pop("input_schema")
    return {"type": "function", "function": function}


# -- messages ------------------------------------------------------------------------------------------------


def _messages(known: _Body) -> list[Json]:
    chat = Conversation()
    for text in _texts(known.system, "system"):
        chat.system(text)
    for number, raw in enumerate(known.messages):
        place = f"messages[{number}]"
        message = read(_decode_message, raw, place)
        content = message.content
        blocks = [_Block("text", text=content)] if isinstance(content, str) else content
        if message.role == "assistant":
            _add_assistant(chat, blocks, f"{place}.content")
        elif message.role == "user":
            _add_user(chat, blocks, f"{place}.content")
        elif message.role == "system":
            for at, block in enumerate(blocks):
                chat.system(_text(block, f"{place}.content[{at}]"))
        else:
            raise wrong(f"{place}.role", "must be user, assistant or system")
    return chat.messages


def _add_assistant(chat: Conversation, blocks: list[_Block], place: str) -> None:
    for number, block in enumerate(blocks):
        here = f"{place}[{number}]"
        if block.type == "tool_use":
            call_id, name = needed(block.id, here, "id"), needed(block.name, here, "name")
            if block.input is None:
                raise wrong(f"{here}.input", "is missing")
            chat.call(call_id, name, _encode(block.input).decode())
        elif block.type == "thinking":
            if block.thinking:
                chat.reasoning(block.thinking)
        elif block.type != "redacted_thinking":
            # Redacted thinking is encrypted for its provider.
            chat.assistant(_text(block, here))


def _add_user(chat: Conversation, blocks: list[_Block], place: str) -> None:
    texts = []
    for number, block in enumerate(blocks):
        here = f"{place}[{number}]"
        if block.type == "tool_result":
            chat.tool(needed(block.tool_use_id, here, "tool_use_id"), _texts(block.content, f"{here}.content"))
        else:
            texts.append(_text(block, here))
    if texts or not blocks:
        chat.user(texts)


def _texts(raw: msgspec.Raw, place: str) -> list[str]:
    """The texts of a string, or of a list of text blocks."""
    if bytes(raw) == b"null":
        return []
    found = read(_decode_content, raw, place)
    if isinstance(found, str):
        return [found] if found else []
    return [_text(block, f"{place}[{number}]") for number, block in enumerate(found)]


def _text(block: _Block, place: str) -> str:
    if block.type != "text":
        raise unsupported(f"{place}.type", block.type, _TEXT_ONLY)
    if block.text is None:
        raise wrong(f"{place}.text", "is missing")
    return block.text
