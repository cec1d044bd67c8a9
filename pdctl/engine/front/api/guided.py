"""Guided output and tools: a request's rules for its answer, as a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pdctl.engine.front.api.parsers.tool_calls import ToolFormat
from pdctl.engine.front.api.schemas import check_schema, narrowed, unsupported_pattern
from pdctl.net.openai.api import ApiError
from pdctl.net.openai.fields import ChatBody, CompletionBody, Structured, is_lmdeploys

# Maximum characters of a schema as JSON.
_MAX_GRAMMAR = 65_536


def tool_format(body: CompletionBody | ChatBody) -> ToolFormat:
    """How tool calls appear in the output. Raises ApiError."""
    if not isinstance(body, ChatBody):
        return ToolFormat.NONE
    if not body.tools:
        # LMDeploy's proxy fills in "auto", with or without tools.
        neutral = (None, "none", "auto") if is_lmdeploys(body) else (None, "none")
        if body.tool_choice not in neutral:
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return ToolFormat.NONE
    for tool in body.tools:
        _function(tool)
    if body.tool_choice == "none":
        return ToolFormat.NONE
    return ToolFormat.FREE if body.tool_choice in (None, "auto") else ToolFormat.FORCED


def grammar_of(body: CompletionBody | ChatBody) -> str:
    """The grammar of the output: a tool call if one is required, else the rule in one of the guiding fields.

    Raises ApiError if several fields give a rule.
    """
    found = [(name, text) for name, text in _guides(body) if text]
    if len(found) > 1:
        message = f"{found[0][0]} and {found[1][0]} both constrain the output: send only one of them"
        raise ApiError(400, message, param=found[1][0])
    return found[0][1] if found else ""


def _guides(body: CompletionBody | ChatBody) -> Iterator[tuple[str, str]]:
    """(field, grammar) of every field that guides the output."""
    if isinstance(body, ChatBody) and tool_format(body) is ToolFormat.FORCED:
        yield "tools", _bounded(json.dumps({"json": narrowed(_call_schema(body))}), "tools")
    yield "response_format", _format_grammar(body.response_format)
    given = body.structured_outputs or Structured()
    for name, guide in (
        ("structured_outputs", given),
        ("guided_json", Structured(json=body.guided_json)),
        ("guided_regex", Structured(regex=body.guided_regex)),
        ("guided_choice", Structured(choice=body.guided_choice)),
        ("guided_grammar", Structured(grammar=body.guided_grammar)),
    ):
        for text in _structured(guide, name):
            yield name, text


def _structured(given: Structured, param: str) -> Iterator[str]:
    if given.json is not None:
        yield schema_grammar(_schema_of(given.json, param), param)
    if given.json_object:
        yield json.dumps({"json": True})
    if given.regex is not None:
        if reason := unsupported_pattern(given.regex):
            raise ApiError(400, f"{param}: {reason}", param=param)
        yield _bounded(json.dumps({"regex": given.regex}), param)
    if given.choice is not None:
        if not given.choice or not all(given.choice):
            raise ApiError(400, f"{param}: choices are one or more texts, none of them empty", param=param)
        yield _bounded(json.dumps({"regex": "|".join(map(_literal, given.choice))}), param)
    if given.grammar is not None:
        yield _bounded(json.dumps({"ebnf": given.grammar}), param)


def _schema_of(given: dict[str, object] | str, param: str) -> object:
    """The schema, given as an object or as JSON text."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError as failure:
        raise ApiError(400, f"{param}: the schema is not valid JSON: {failure}", param=param) from None


def _literal(text: str) -> str:
    """A pattern that matches exactly this text."""
    return "".join(f"\\{letter}" if letter in r"\^$.|?*+()[]{}/-" else letter for letter in text)


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
    """The grammar of a JSON Schema. Raises ApiError for a schema that cannot be enforced."""
    check_schema(schema, param, where)
    return _bounded(json.dumps({"json": narrowed(schema)}), param)


def _bounded(grammar: str, param: str) -> str:
    if len(grammar) > _MAX_GRAMMAR:
        raise ApiError(
            400, f"the schema is {len(grammar)} characters long; at most {_MAX_GRAMMAR} are allowed", param=param
        )
    return grammar


def _call_schema(body: ChatBody) -> dict[str, object]:
    """The schema of one call to one of the tools, or to the one in tool_choice."""
    functions = [_function(tool) for tool in body.tools or []]
    if isinstance(body.tool_choice, dict):
        named = _function(body.tool_choice, "tool_choice").get("name")
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


def _function(tool: dict[str, object], param: str = "tools") -> dict[str, object]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, "a tool is {type: function, function: {name, parameters}}", param=param)
    return function
