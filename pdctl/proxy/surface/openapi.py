"""The OpenAPI description at /openapi.json. Engines may accept more fields."""

from __future__ import annotations

from pdctl.proxy.client.requests import MAX_LEGS
from pdctl.proxy.surface.openapi_translated import ANTHROPIC_ERROR, schemas

Json = dict[str, object]

_INT64 = {"minimum": -(2**63), "maximum": 2**63 - 1}


def description(model: str, max_model_len: int, refuses_unknown: bool) -> Json:
    """The OpenAPI 3.1 document. It cannot express rules beyond single fields, such as a prompt's length in tokens."""
    count: Json = {"type": ["integer", "null"], "minimum": 1, "maximum": max_model_len}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pdctl", "version": "1",
        "description": "OpenAI's and Anthropic's API over prefill and decode engines"},
        "paths": {
            "/v1/completions": {"post": _generation("CompletionRequest")},
            "/v1/chat/completions": {"post": _generation("ChatRequest")},
            "/v1/responses": {"post": _generation("ResponsesRequest")},
            "/v1/responses/input_tokens": {"post": _counting("Count the tokens of an input", "ResponsesCount")},
            "/v1/messages": {"post": _anthropic(_generation("MessagesRequest"))},
            "/v1/messages/count_tokens": {
                "post": _anthropic(_counting("Count the tokens of messages", "MessagesCount"))
            },
            "/v1/models": {"get": _operation("List the models", {"200": "OK"})},
            "/v1/models/{name}": {
                "get": {
                    **_operation("Get one model", {"200": "OK", "404": "No such model"}),
                    "parameters": [
                        {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": [model]}}
                    ],
                }
            },
            "/tokenize": {"post": _linked(_posted("Tokenize a text", "TokenizeRequest"))},
            "/detokenize": {"post": _posted("Detokenize token ids", "DetokenizeRequest")},
            "/health": {"get": _open("Whether the service can answer requests", {"200": "Yes", "503": "No"})},
            "/ready": {"get": _open("Whether every engine is available", {"200": "Yes", "503": "No"})},
            "/metrics": {"get": _text("Prometheus metrics of proxy, engines, processes and links")},
            "/metrics/proxy": {"get": _text("Prometheus metrics of the proxy alone")},
            "/version": {"get": _open("pdctl's version", {"200": "OK"})},
            "/metrics/vllm": {"get": _text("Prometheus metrics under vLLM's names")},
        },
        "components": {
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": {
                "Error": _ERROR, "AnthropicError": ANTHROPIC_ERROR,
                **schemas(_model(model), count, refuses_unknown),
                "CompletionRequest": {
                    "type": "object", "required": ["prompt"], "additionalProperties": not refuses_unknown,
                    "properties": {"prompt": _PROMPT, **_shared(model), **_COMPLETION, "max_tokens": count},
                    "example": {"prompt": "Once upon a time", "max_tokens": 16},
                },
                "ChatRequest": {
                    "type": "object", "required": ["messages"], "additionalProperties": not refuses_unknown,
                    "properties": {
                        "messages": _MESSAGES, **_shared(model), **_CHAT, "max_tokens": count,
                        "max_completion_tokens": count,
                    },
                    "example": {"messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 16},
                },
                "TokenizeRequest": {
                    "anyOf": [
                        {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                        {"type": "object", "required": ["messages"], "properties": {"messages": _MESSAGES}},
                    ],
                },
                "DetokenizeRequest": {
                    "type": "object", "required": ["tokens"],
                    "properties": {"tokens": {"type": "array", "items": _TOKEN}},
                    "example": {"tokens": [1, 2, 3]},
                },
            },
        },
    }  # fmt: skip


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


def _whole(low: int, high: int) -> Json:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


_FLAG: Json = {"type": ["boolean", "null"]}
_TEXT: Json = {"type": ["string", "null"]}
_OBJECT: Json = {"type": ["object", "null"]}
_SOME_TOKENS: Json = {"type": ["array", "null"], "items": _TOKEN, "minItems": 1}
_TEXTS: Json = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
_SCHEMA: Json = {"anyOf": [_OBJECT, {"type": "string"}]}

# Fields that the builtin engine accepts on both paths; other kinds accept more.
_BOTH: Json = {
    "stream": _FLAG,
    "stream_options": {
        "type": ["object", "null"],
        "properties": {"include_usage": _FLAG, "continuous_usage_stats": _FLAG},
        "description": "only with stream = true",
    },
    "n": _whole(1, MAX_LEGS),
    "seed": {"type": ["integer", "null"], **_INT64},
    "temperature": _number(0, 100),
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "top_k": _whole(-1, 2**31),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.001, 100),
    "stop": {
        "oneOf": [
            {"type": ["string", "null"], "minLength": 1},
            {"type": "array", "maxItems": 16, "items": {"type": "string", "minLength": 1}},
        ]
    },
    "logit_bias": {"type": ["object", "null"], "description": "token ids to numbers from -100 to 100"},
    "min_tokens": {**_whole(0, 2**31), "description": "at most max_tokens"},
    "ignore_eos": _FLAG,
    "return_token_ids": _FLAG,
    "echo": _FLAG,
    "prompt_logprobs": {**_whole(0, 20), "description": "only without stream"},
    "priority": {**_whole(-(2**31), 2**31), "description": "lower is served first"},
    "user": _TEXT,
    "stop_token_ids": {**_SOME_TOKENS, "description": "token ids of the model's vocabulary"},
    "allowed_token_ids": {**_SOME_TOKENS, "description": "token ids of the model's vocabulary"},
    "bad_words": {"type": ["array", "null"], "items": {"type": "string", "pattern": "\\S"}, "maxItems": 128},
    "include_stop_str_in_output": _FLAG,
    "truncate_prompt_tokens": {"type": ["integer", "null"], "anyOf": [{"const": -1}, {"minimum": 1}, {"const": None}]},
    "response_format": {**_OBJECT, "description": "text, json_object, or json_schema"},
    "structured_outputs": {**_OBJECT, "description": "one of json, regex, choice, grammar, json_object"},
    "guided_json": _SCHEMA,
    "guided_regex": _TEXT,
    "guided_choice": {"anyOf": [_TEXTS, {"type": "null"}]},
    "guided_grammar": _TEXT,
}
_COMPLETION: Json = {"logprobs": _whole(0, 20)}
_CHAT: Json = {
    "logprobs": _FLAG,
    "top_logprobs": {**_whole(0, 20), "description": "only with logprobs"},
    "tools": {"type": ["array", "null"], "items": {"type": "object"}},
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", None]}, {"type": "object"}]},
    "parallel_tool_calls": _FLAG,
    "include_reasoning": _FLAG,
    "reasoning_effort": {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max", None]},
    "verbosity": {"enum": ["low", "medium", "high", None]},
    "chat_template_kwargs": _OBJECT,
    "add_generation_prompt": _FLAG,
    "continue_final_message": _FLAG,
}


def _shared(model: str) -> Json:
    return {"model": _model(model), **_BOTH}


def _model(name: str) -> Json:
    return {"type": ["string", "null"], "enum": [name, None]}


def _error(about: str, schema: str = "Error") -> Json:
    return {
        "description": about, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }  # fmt: skip


def _anthropic(operation: Json) -> Json:
    """An operation with errors in Anthropic's form."""
    responses = operation["responses"]
    assert isinstance(responses, dict)
    told = {
        status: answer if status == "200" else _error(answer["description"], "AnthropicError")
        for status, answer in responses.items()
    }
    return {**operation, "responses": told}


def _responses(statuses: dict[str, str]) -> Json:
    return {
        status: {"description": about, "content": {"application/json": {}}} if status == "200" else _error(about)
        for status, about in statuses.items()
    }


def _operation(summary: str, statuses: dict[str, str]) -> Json:
    known = {**statuses, "401": "No or unknown API key"}
    return {"summary": summary, "security": [{}, {"key": []}, {"header": []}], "responses": _responses(known)}


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
    statuses = {
        "200": "OK",
        "400": "Malformed",
        "413": "Too large",
        "415": "Unsupported content-encoding",
        "503": "No engine is ready",
    }
    return {**_operation(summary, statuses), "requestBody": _body(schema)}


def _counting(summary: str, schema: str) -> Json:
    found = _posted(summary, schema)
    responses = found["responses"]
    assert isinstance(responses, dict)
    return {**found, "responses": {**responses, "404": _error("No such model")}}


def _linked(operation: Json) -> Json:
    """Link the result of tokenization to the input of detokenization."""
    responses = operation["responses"]
    assert isinstance(responses, dict)
    responses["200"]["links"] = {
        "detokenize": {
            "operationRef": "#/paths/~1detokenize/post",
            "requestBody": {"tokens": "$response.body#/tokens"},
        }
    }
    return operation


def _generation(schema: str) -> Json:
    statuses = {
        "200": "OK", "400": "Malformed, or beyond the model's limits", "404": "No such model", "413": "Too large",
        "415": "Unsupported content-encoding",
        "422": "In quarantine: engines died while running this request", "429": "Too busy: see Retry-After",
        "502": "Engines failed repeatedly", "503": "No engine is ready",
    }  # fmt: skip
    found = {**_operation("Generate", statuses), "requestBody": _body(schema)}
    responses = found["responses"]
    assert isinstance(responses, dict)
    responses["200"] = {"description": "OK", "content": {"application/json": {}, "text/event-stream": {}}}
    return found
