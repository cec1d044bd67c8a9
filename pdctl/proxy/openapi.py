"""The OpenAPI description at /openapi.json: what the proxy itself reads and promises. Engines take more fields."""

from __future__ import annotations

from pdctl.proxy.requests import MAX_LEGS

Json = dict[str, object]

_INT64 = {"minimum": -(2**63), "maximum": 2**63 - 1}


def description(model: str) -> Json:
    """OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "pdctl", "version": "1", "description": "OpenAI-compatible, over prefill and decode engines"},
        "paths": {
            "/v1/completions": {"post": _generation("CompletionRequest")},
            "/v1/chat/completions": {"post": _generation("ChatRequest")},
            "/v1/models": {"get": _operation("The models", {"200": "OK"})},
            "/v1/models/{name}": {
                "get": {
                    **_operation("One model", {"200": "OK", "404": "No such model"}),
                    "parameters": [
                        {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                    ],
                }
            },
            "/tokenize": {"post": _posted("Token ids of a text", "TokenizeRequest")},
            "/detokenize": {"post": _posted("The text of token ids", "DetokenizeRequest")},
            "/health": {"get": _open("Whether a request sent now would be answered", {"200": "Yes", "503": "No"})},
            "/ready": {"get": _open("Whether every engine can be used", {"200": "Yes", "503": "No"})},
            "/metrics": {"get": _text("Prometheus metrics")},
            "/metrics/vllm": {"get": _text("Prometheus metrics under vLLM's names")},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": _ERROR,
                "CompletionRequest": _request(model, {"prompt": _PROMPT}, ["prompt"], {"max_tokens": _COUNT}),
                "ChatRequest": _request(
                    model, {"messages": _MESSAGES}, ["messages"],
                    {"max_tokens": _COUNT, "max_completion_tokens": _COUNT},
                ),
                "TokenizeRequest": {
                    "type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}},
                },
                "DetokenizeRequest": {
                    "type": "object", "required": ["tokens"],
                    "properties": {"tokens": {"type": "array", "items": _TOKEN}},
                },
            },
        },
    }  # fmt: skip


_COUNT: Json = {"type": ["integer", "null"], "minimum": 1}
_TOKEN: Json = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TOKENS: Json = {"type": "array", "minItems": 1, "items": _TOKEN}
_PROMPT: Json = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _TOKENS,
        {"type": "array", "minItems": 1, "maxItems": MAX_LEGS, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "maxItems": MAX_LEGS, "items": _TOKENS},
    ]
}
_CONTENT: Json = {
    "anyOf": [
        {"type": ["string", "null"]},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        },
    ]
}
_MESSAGES: Json = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "object", "required": ["role"], "properties": {"role": {"type": "string"}, "content": _CONTENT}},
}
_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["integer", "string", "null"]},
            },
        }
    },
}


def _number(low: float, high: float) -> Json:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


# What the builtin engine takes besides; engines of other kinds take more.
_MORE: Json = {
    "stop": {
        "oneOf": [
            {"type": ["string", "null"], "minLength": 1},
            {"type": "array", "maxItems": 16, "items": {"type": "string", "minLength": 1}},
        ]
    },
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.001, 100),
    "min_p": _number(0, 1),
    "top_k": {"type": ["integer", "null"], "minimum": -1, "maximum": 2**31},
    "ignore_eos": {"type": ["boolean", "null"]},
    "return_token_ids": {"type": ["boolean", "null"]},
    "user": {"type": ["string", "null"]},
}


def _request(model: str, input_field: Json, required: list[str], limits: Json) -> Json:
    properties: Json = {
        **input_field,
        "model": {"type": ["string", "null"], "enum": [model, None]},
        "stream": {"type": ["boolean", "null"]},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_LEGS},
        "seed": {"type": ["integer", "null"], **_INT64},
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 100},
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "priority": {
            "type": ["integer", "null"],
            "minimum": -(2**31),
            "maximum": 2**31,
            "description": "lower is served first",
        },
        **_MORE,
        **limits,
    }
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _error(about: str) -> Json:
    return {"description": about, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}


def _responses(statuses: dict[str, str]) -> Json:
    return {
        status: {"description": about, "content": {"application/json": {}}} if status == "200" else _error(about)
        for status, about in statuses.items()
    }


def _operation(summary: str, statuses: dict[str, str]) -> Json:
    known = {**statuses, "401": "No or unknown API key"}
    return {"summary": summary, "security": [{}, {"key": []}], "responses": _responses(known)}


def _open(summary: str, statuses: dict[str, str]) -> Json:
    answers = {
        status: {"description": about, "content": {"application/json": {}}} for status, about in statuses.items()
    }
    return {"summary": summary, "responses": answers}


def _text(summary: str) -> Json:
    return {"summary": summary, "responses": {"200": {"description": "OK", "content": {"text/plain": {}}}}}


def _body(schema: str) -> Json:
    return {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


def _posted(summary: str, schema: str) -> Json:
    statuses = {"200": "OK", "400": "Malformed", "413": "Too large", "503": "No engine is ready"}
    return {**_operation(summary, statuses), "requestBody": _body(schema)}


def _generation(schema: str) -> Json:
    statuses = {
        "200": "OK", "400": "Malformed, or more than the model can do", "404": "No such model", "413": "Too large",
        "422": "In quarantine: engines died of this request", "429": "Too busy: see Retry-After",
        "502": "Engines failed it again and again", "503": "No engine is ready",
    }  # fmt: skip
    found = {**_operation("Generate", statuses), "requestBody": _body(schema)}
    responses = found["responses"]
    assert isinstance(responses, dict)
    responses["200"] = {"description": "OK", "content": {"application/json": {}, "text/event-stream": {}}}
    return found
