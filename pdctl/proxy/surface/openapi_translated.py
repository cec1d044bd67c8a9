"""The OpenAPI description of the translated APIs: the schemas of their requests, and the form of Anthropic's errors."""

from __future__ import annotations

Json = dict[str, object]

_FLAG: Json = {"type": ["boolean", "null"]}
_TEXT: Json = {"type": ["string", "null"]}
_NAME: Json = {"type": "string", "minLength": 1}
_CALL_ID: Json = {"type": "string", "minLength": 1}
_TEMPERATURE: Json = {"type": ["number", "null"], "minimum": 0, "maximum": 100}
_TOP_P: Json = {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1}
_TOP_K: Json = {"type": ["integer", "null"], "minimum": -1, "maximum": 2**31}
_METADATA: Json = {"type": ["object", "null"], "additionalProperties": {"type": "string"}}
_SCHEMA: Json = {"type": "object", "description": "a JSON Schema"}


def _object(required: list[str], **properties: object) -> Json:
    return {"type": "object", "required": required, "properties": properties}


def _texts(*kinds: str) -> Json:
    """A string, or a list of parts with text."""
    part = _object(["type", "text"], type={"enum": list(kinds)}, text={"type": "string"})
    return {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}


_NULLABLE_TEXTS: Json = {"anyOf": [{"type": "null"}, _texts("text")]}
_FUNCTION: Json = _object(
    ["type", "name"], type={"const": "function"}, name=_NAME, description=_TEXT, strict=_FLAG,
    parameters={"type": ["object", "null"]},
)  # fmt: skip
_ITEM: Json = {
    "anyOf": [
        _object(
            ["role", "content"], type={"enum": ["message", None]},
            role={"enum": ["user", "system", "developer", "assistant"]}, content=_texts("input_text", "output_text"),
        ),
        _object(
            ["type", "call_id", "name", "arguments"], type={"const": "function_call"}, call_id=_CALL_ID, name=_NAME,
            arguments={"type": "string"},
        ),
        _object(
            ["type", "call_id", "output"], type={"const": "function_call_output"}, call_id=_CALL_ID,
            output=_texts("input_text", "output_text"),
        ),
    ]
}  # fmt: skip
_FORMAT: Json = {
    "anyOf": [
        {"type": "null"},
        _object(["type"], type={"enum": ["text", "json_object"]}),
        _object(["type", "name", "schema"], type={"const": "json_schema"}, name={"type": "string"}, schema=_SCHEMA),
    ]
}
_BLOCK: Json = {
    "anyOf": [
        _object(["type", "text"], type={"const": "text"}, text={"type": "string"}),
        _object(
            ["type", "id", "name", "input"], type={"const": "tool_use"}, id=_CALL_ID, name=_NAME,
            input={"type": "object"},
        ),
        _object(["type", "tool_use_id"], type={"const": "tool_result"}, tool_use_id=_CALL_ID, content=_NULLABLE_TEXTS),
    ]
}  # fmt: skip
_MESSAGE: Json = _object(
    ["role", "content"],
    role={"enum": ["user", "assistant"]},
    content={"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK}]},
)
_TOOL: Json = _object(["name", "input_schema"], name=_NAME, description=_TEXT, input_schema=_SCHEMA)

_HELLO = [{"role": "user", "content": "Hello"}]
# The fields of which tokens are counted.
_RESPONSE_PROMPT: Json = {
    "input": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _ITEM}]},
    "instructions": _TEXT,
    "tools": {"type": ["array", "null"], "items": _FUNCTION},
    "tool_choice": {"enum": ["none", "auto", "required", None], "description": "or an object that names a tool"},
    "parallel_tool_calls": _FLAG,
}
_MESSAGE_PROMPT: Json = {
    "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
    "system": _NULLABLE_TEXTS,
    "tools": {"type": ["array", "null"], "items": _TOOL},
    "tool_choice": {"anyOf": [{"type": "null"}, _object(["type"], type={"enum": ["auto", "any", "none"]})]},
}

ANTHROPIC_ERROR: Json = _object(
    ["type", "error"],
    type={"const": "error"},
    error=_object(["type", "message"], type={"type": "string"}, message={"type": "string"}),
)


def schemas(model: Json, max_tokens: Json, refuses_unknown: bool) -> Json:
    """The schemas of both APIs' requests. `model`, `max_tokens`: of these fields."""
    response: Json = {"model": model, **_RESPONSE_PROMPT}
    message: Json = {"model": model, **_MESSAGE_PROMPT}
    return {
        "ResponsesCount": _request(["input"], False, {"input": "Hello"}, **response),
        "ResponsesRequest": _request(
            ["input"], refuses_unknown, {"input": "Hello", "max_output_tokens": 16}, **response, stream=_FLAG,
            max_output_tokens=max_tokens, temperature=_TEMPERATURE, top_p=_TOP_P, metadata=_METADATA, user=_TEXT,
            text={"anyOf": [{"type": "null"}, _object([], format=_FORMAT)]},
            store={"enum": [False, None], "description": "nothing is stored"},
        ),
        "MessagesCount": _request(["messages"], False, {"messages": _HELLO}, **message),
        "MessagesRequest": _request(
            ["messages", "max_tokens"], refuses_unknown, {"messages": _HELLO, "max_tokens": 16}, **message,
            stream=_FLAG, max_tokens={**max_tokens, "type": "integer"}, temperature=_TEMPERATURE, top_p=_TOP_P,
            top_k=_TOP_K, metadata={"anyOf": [{"type": "null"}, _object([], user_id=_TEXT)]},
            stop_sequences={"type": ["array", "null"], "maxItems": 16, "items": _NAME},
        ),
    }  # fmt: skip


def _request(required: list[str], refuses_unknown: bool, example: Json, **properties: object) -> Json:
    return {**_object(required, **properties), "additionalProperties": not refuses_unknown, "example": example}
