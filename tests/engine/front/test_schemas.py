"""Every keyword of JSON Schema is either enforced or refused with name and location. None is ignored."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import jsonschema
import pytest
import xgrammar
from xgrammar.testing import _is_grammar_accept_string

from pdctl.engine.front.api.schemas import check_schema, narrowed, unsupported_pattern
from pdctl.engine.model.grammar import _MAX_BLANKS, json_grammar
from pdctl.net.openai.api import ApiError

STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
A_AND_B = {"type": "object", "properties": {"a": INTEGER, "b": STRING}}
LETTERS = [bytes([code]) for code in range(128)] + [b"\xc3", b"\xa9"]

# Accepted schemas. Everything that the grammar allows must be valid.
KEPT: list[dict[str, Any]] = [
    STRING, INTEGER, NUMBER, {"type": "boolean"}, {"type": "null"}, {},
    {"type": ["integer", "null"]}, {"type": ["integer", "string"], "minimum": 3, "minLength": 2},
    A_AND_B, {**A_AND_B, "required": ["a"]}, {**A_AND_B, "required": ["a", "b"], "additionalProperties": False},
    {**A_AND_B, "required": ["b"], "additionalProperties": True}, {"properties": {"a": INTEGER}},
    {"type": "object", "properties": {"a": True, "b": {}}, "required": ["a"]},
    {**A_AND_B, "minProperties": 1}, {**A_AND_B, "maxProperties": 1}, {**A_AND_B, "minProperties": 2},
    {"type": "object", "additionalProperties": INTEGER}, {"type": "object", "additionalProperties": True},
    {"type": "object", "patternProperties": {"^a": INTEGER}}, {"type": "object", "propertyNames": {"pattern": "^a+$"}},
    {"type": "array"}, {"type": "array", "items": INTEGER}, {"items": INTEGER},
    {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 3}, {"type": "array", "maxItems": 1},
    {"type": "array", "prefixItems": [INTEGER, STRING]}, {"type": "array", "prefixItems": [INTEGER], "items": False},
    {"type": "array", "prefixItems": [INTEGER], "items": STRING, "minItems": 2},
    {"type": "array", "uniqueItems": False, "items": {"enum": [1, 2]}},
    {"type": "string", "minLength": 2, "maxLength": 3}, {"type": "string", "maxLength": 0},
    {"type": "string", "minLength": 3}, {"type": "string", "maxLength": 8}, {"type": "string", "maxLength": 1},
    {"type": "string", "minLength": 1, "maxLength": 1}, {"type": "string", "minLength": 0},
    {"type": "string", "pattern": "^[^a]+$"},
    {"type": "string", "pattern": "^.{2,4}$"}, {"type": "string", "pattern": "^\\S{2}\\W\\D$"},
    {"type": "string", "pattern": "^a(b[0-9]+)?$"},
    {"type": "string", "pattern": "^a+b?$"}, {"type": "string", "pattern": "(?:x|y)[0-9]{2}"},
    {"type": "integer", "minimum": 3, "maximum": 10}, {"type": "integer", "exclusiveMinimum": -3},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5}, {"type": "integer", "maximum": -1},
    {"type": "number", "minimum": 3.5, "maximum": 10}, {"type": "number", "exclusiveMinimum": 0},
    {"type": "number", "exclusiveMaximum": 1.5}, {"type": "number", "minimum": 0.1, "maximum": 0.3},
    {"enum": [1, "a", None, {"b": [1]}]}, {"const": {"a": [1, 2]}},
    {"type": "string", "enum": ["a", "\u00e9", "\n", '"']},
    {"anyOf": [INTEGER, STRING]}, {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}]},
    {"oneOf": [STRING, INTEGER]},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": kind}, "v": INTEGER}, "required": ["kind", "v"]}
               for kind in ("a", "b")]},
    {"allOf": [{"type": "integer", "minimum": 3}]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer", "minimum": 4}}},
    {"$ref": "#/definitions/a", "definitions": {"a": STRING}},
    {"type": "object", "properties": {"next": {"$ref": "#"}}},
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
    {"type": "integer", "title": "t", "description": "d", "default": 1, "examples": [2], "x-order": 1, "$comment": "c"},
    *({"type": "string", "format": name} for name in
      ("date", "date-time", "time", "duration", "uuid", "ipv4", "ipv6", "hostname", "email", "uri")),
]  # fmt: skip

# Refused schemas: schema, location, part of the message.
REFUSED: list[tuple[object, str, str]] = [
    ({"type": "object", "required": ["a"]}, "$.required", "'required' names \"a\""),
    ({**A_AND_B, "required": ["c"]}, "$.required", "'required' names \"c\""),
    ({"type": "object", "properties": {"o": {"type": "object", "required": ["x"]}}}, "$.properties.o.required", "na"),
    ({**A_AND_B, "additionalProperties": STRING}, "$.additionalProperties", "beside 'properties'"),
    ({**A_AND_B, "patternProperties": {"^a": STRING}}, "$.patternProperties", "one pattern"),
    ({"type": "object", "patternProperties": {"^a": INTEGER, "b$": STRING}}, "$.patternProperties", "one pattern"),
    ({"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": INTEGER}, "$.propertyNames", "bes"),
    ({"type": "object", "minProperties": 1}, "$.minProperties", "beside 'properties'"),
    ({"type": "object", "maxProperties": 1}, "$.maxProperties", "beside 'properties'"),
    ({**A_AND_B, "dependentRequired": {"a": ["b"]}}, "$.dependentRequired", "not supported"),
    ({**A_AND_B, "dependentSchemas": {"a": {"required": ["b"]}}}, "$.dependentSchemas", "not supported"),
    ({**A_AND_B, "dependencies": {"a": ["b"]}}, "$.dependencies", "not supported"),
    ({**A_AND_B, "unevaluatedProperties": False}, "$.unevaluatedProperties", "not supported"),
    ({"type": "array", "uniqueItems": True}, "$.uniqueItems", "not supported"),
    ({"type": "array", "contains": INTEGER}, "$.contains", "not supported"),
    ({"type": "array", "contains": INTEGER, "minContains": 2}, "$.contains", "not supported"),
    ({"type": "array", "items": [INTEGER]}, "$.items", "must be a schema"),
    ({"type": "array", "additionalItems": False}, "$.additionalItems", "not supported"),
    ({"type": "array", "unevaluatedItems": False}, "$.unevaluatedItems", "not supported"),
    ({"type": "string", "pattern": "^(?=b)a$"}, "$.pattern", "look-around"),
    ({"type": "string", "pattern": "^(?!b)a$"}, "$.pattern", "look-around"),
    ({"type": "string", "pattern": "(?<=b)a"}, "$.pattern", "look-around"),
    ({"type": "string", "pattern": "(?P<n>a)"}, "$.pattern", "named groups"),
    ({"type": "string", "pattern": "^a$", "minLength": 3}, "$.pattern", "beside 'minLength'"),
    ({"type": "string", "format": "date", "maxLength": 3}, "$.format", "beside 'maxLength'"),
    ({"type": "string", "format": "color"}, "$.format", "these are: date"),
    ({"type": "string", "format": "json-pointer"}, "$.format", "these are: date"),
    ({"type": "string", "contentEncoding": "base64"}, "$.contentEncoding", "not supported"),
    ({"type": "number", "multipleOf": 2}, "$.multipleOf", "not supported"),
    ({"minimum": 3}, "$.minimum", "without the type"),
    ({"minItems": 3}, "$.minItems", "without the type"),
    ({"type": "string", "minimum": 3}, "$.minimum", "without the type"),
    ({"type": "integer", "enum": [1, "a"]}, "$.enum", "not of the node's type"),
    ({"type": "integer", "const": "a"}, "$.const", "not of the node's type"),
    ({"enum": [1], "minimum": 0}, "$.minimum", "beside 'enum'"),
    ({"anyOf": [INTEGER, STRING], "type": "string"}, "$.type", "beside 'anyOf'"),
    ({"anyOf": [INTEGER], "minimum": 3}, "$.minimum", "beside 'anyOf'"),
    ({"oneOf": [INTEGER, NUMBER]}, "$.oneOf", "tell the schemas apart"),
    ({"oneOf": [{"properties": {"a": INTEGER}}, {"properties": {"b": INTEGER}}]}, "$.oneOf", "tell the schemas apart"),
    ({"allOf": [INTEGER, {"type": "integer", "minimum": 3}]}, "$.allOf", "more than one schema"),
    ({"allOf": [INTEGER], "maximum": 4}, "$.maximum", "beside 'allOf'"),
    ({"not": INTEGER}, "$.not", "not supported"),
    ({"if": INTEGER, "then": {"minimum": 3}}, "$.if", "not supported"),
    ({"type": "integer", "nullable": True}, "$.nullable", "not supported"),
    ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": INTEGER}}, "$.minimum", "beside '$ref'"),
    ({"$ref": "#a", "$defs": {"a": {"$anchor": "a"}}}, "$.$ref", "must lead to a place"),
    ({"$ref": "http://example.com/x"}, "$.$ref", "must lead to a place"),
    ({"$ref": "#/$defs/missing"}, "$.$ref", "must lead to a place"),
    ({"$dynamicRef": "#a"}, "$.$dynamicRef", "not supported"),
    ({"type": "date"}, "$.type", "not a JSON Schema type"),
    ({"type": "object", "properties": {"a": False}}, "$.properties.a", "must be a schema"),
    (False, "$", "must be a schema"),
    ([INTEGER], "$", "must be a schema"),
]  # fmt: skip

NEVER_ENDING: list[dict[str, Any]] = [
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
]

FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


def valid(schema: dict[str, Any], text: str) -> bool:
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    return bool(validator.is_valid(json.loads(text)))


def grammar_of(schema: object) -> xgrammar.Grammar:
    return json_grammar(narrowed(schema))


def answers(schema: object, count: int) -> list[str]:
    """Random walks through the grammar, as a model at any temperature could take; returns those that ended."""
    info = xgrammar.TokenizerInfo([*LETTERS, b"</s>"], vocab_size=len(LETTERS) + 1, stop_token_ids=[len(LETTERS)])
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(grammar_of(schema))
    found = []
    for seed in range(count):
        chance, matcher, text = random.Random(seed), xgrammar.GrammarMatcher(compiled), b""
        mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
        while not matcher.is_terminated() and len(text) < 200:
            matcher.fill_next_token_bitmask(mask)
            allowed = [n for n in range(info.vocab_size) if int(mask[0, n // 32]) >> (n % 32) & 1]
            # End tokens are rare among letters: without this, walks hardly ever end.
            ends = [n for n in allowed if n == len(LETTERS) or (n < len(LETTERS) and LETTERS[n] in b'"}],')]
            token = chance.choice(ends if ends and chance.random() < 0.4 else allowed)
            assert matcher.accept_token(token)
            if token < len(LETTERS):
                text += LETTERS[token]
        if matcher.is_terminated():
            found.append(text.decode())
    return found


@pytest.mark.parametrize("schema", KEPT, ids=lambda schema: json.dumps(schema)[:60])
def test_what_is_accepted_is_kept(schema: dict[str, Any]) -> None:
    check_schema(schema, "response_format")
    found = answers(schema, 30)
    assert found, "no answer ended"
    for text in found:
        assert valid(schema, text), text


@pytest.mark.parametrize(("schema", "place", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_answers_might_break_is_refused(schema: object, place: str, message: str) -> None:
    with pytest.raises(ApiError) as found:
        check_schema(schema, "response_format")
    assert (found.value.status, found.value.param) == (400, "response_format")
    assert found.value.message.startswith(f"response_format: {place}: ")
    assert message in found.value.message


@pytest.mark.parametrize("schema", NEVER_ENDING, ids=lambda schema: json.dumps(schema)[:60])
def test_a_schema_that_demands_itself_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="no answer of finite length"):
        check_schema(schema, "response_format")


LENGTHS = [{"minLength": low, "maxLength": high} for low in (0, 1, 2) for high in (1, 2, 9) if low <= high]
LENGTHS += [{"minLength": 0}, {"minLength": 1}, {"minLength": 5}, {"maxLength": 0}]


@pytest.mark.parametrize("bounds", LENGTHS, ids=str)
@pytest.mark.parametrize("around", ["{}", "[{}]", '{{"a": {}}}'])
def test_strings_with_a_length_have_no_raw_control_characters(bounds: dict[str, int], around: str) -> None:
    node: dict[str, Any] = {**STRING, **bounds}
    schema = {"[": {"type": "array", "items": node}, "{": {"type": "object", "properties": {"a": node}}}.get(around[0])
    if around == "{}":
        schema = node
    grammar = grammar_of(schema)
    letters = max(1, bounds.get("minLength", 0))
    for code in (*range(32), 34, 92):
        text = around.format('"' + chr(code) * letters + '"')
        assert not _is_grammar_accept_string(grammar, text), repr(text)
    assert _is_grammar_accept_string(grammar, around.format('"' + "\u00e9" * letters + '"')) == (
        letters <= bounds.get("maxLength", 9)
    )


def test_what_stands_beside_a_length_keeps_its_meaning() -> None:
    schema = {
        "type": "object",
        "properties": {
            "length": {**STRING, "minLength": 1, "maxLength": 3}, "any": {**STRING, "pattern": "^.$"},
            "pattern": {**STRING, "pattern": r"^\d{2,}[^x]$"}, "format": {**STRING, "format": "email"},
            "enum": {"enum": ['[^"\\\r\n]', 2]}, "number": {"type": "number", "minimum": 1.5},
            "nested": {"type": "array", "items": {"$ref": "#/$defs/node"}},
        },
        "required": ["length", "any", "pattern", "format", "enum", "number", "nested"],
        "$defs": {
            "node": {"type": "object", "properties": {"n": {"$ref": "#/$defs/node"}, "s": {"maxLength": 2, **STRING}}},
        },
    }  # fmt: skip
    grammar = grammar_of(schema)
    good = {"length": "ab", "any": "q", "pattern": "12y", "format": "a@b.co", "enum": '[^"\\\r\n]', "number": 2.5,
            "nested": [{"n": {"s": "a"}}]}  # fmt: skip
    assert _is_grammar_accept_string(grammar, json.dumps(good))
    for name, bad in {"length": "abcd", "any": "qq", "pattern": "1y", "format": "no", "enum": "x", "number": 1,
                      "nested": [{"s": "abc"}]}.items():  # fmt: skip
        assert not _is_grammar_accept_string(grammar, json.dumps({**good, name: bad})), name


def test_a_name_cannot_come_twice_in_another_spelling() -> None:
    schema = {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": True}
    grammar = grammar_of(schema)
    assert not _is_grammar_accept_string(grammar, '{"a": 1, "\\u0061": "x"}')
    assert _is_grammar_accept_string(grammar, '{"a": 1}')


def test_large_schemas_are_refused_before_they_are_walked() -> None:
    deep: dict[str, Any] = INTEGER
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ApiError, match="nested too deeply"):
        check_schema(deep, "tools")
    wide = {"type": "object", "properties": {f"p{n}": {"type": "integer", "title": str(n)} for n in range(5000)}}
    with pytest.raises(ApiError, match="more than 4096 parts"):
        check_schema(wide, "tools")


def test_blanks_in_answers_have_a_bound() -> None:
    grammar = grammar_of({"type": "array", "items": INTEGER, "minItems": 1})
    assert _is_grammar_accept_string(grammar, "[ 1 ]")
    assert not _is_grammar_accept_string(grammar, f"[{' ' * (_MAX_BLANKS + 1)}1]")


ATOMS = ("a", "b", "[ab]", r"\d", ".", "(?:ab)", r"(?:a\d+)", r"(?:b|a\d*)", r"(?:\.a+)", "[)?]")
QUANTIFIERS = ("", "", "", "*", "+", "?", "{0,1}", "{1,2}", "{0,2}", "{2}", "{0,}", "{1,}")
WORDS = ["".join(letters) for length in range(5) for letters in itertools.product("ab1.)", repeat=length)]


@pytest.mark.parametrize("seed", range(40))
def test_what_a_pattern_lets_through_matches_it(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(10):
        pattern = "".join(chance.choice(ATOMS) + chance.choice(QUANTIFIERS) for _ in range(chance.randint(1, 4)))
        grammar = grammar_of({"type": "string", "pattern": f"^(?:{pattern})$"})
        for word in chance.sample(WORDS, 40):
            if _is_grammar_accept_string(grammar, json.dumps(word)):
                assert re.fullmatch(pattern, word), (pattern, word)


@pytest.mark.parametrize(
    ("pattern", "good"), [("a\\(?b", True), ("(?:a)", True), ("(?i)a", False), ("\\\\(?=a)", False)]
)
def test_patterns(pattern: str, good: bool) -> None:
    assert bool(unsupported_pattern(pattern)) is not good
