"""Checks which JSON Schemas guided output can enforce.

The grammar compiler (xgrammar) ignores what it does not know, so answers could violate the requested schema. Therefore
each node is checked before it is compiled: a keyword is accepted only if generated answers are known to satisfy it
(tests/engine/front/test_schemas.py validates them, keyword by keyword). Others are refused with name and location.
"""

from __future__ import annotations

import json

from pdctl.engine.front.api.schemas.nodes import TELLING, Endings, Schema, are_disjoint, follow, is_of, types_of
from pdctl.net.openai.api import ApiError

_MAX_NODES, _MAX_DEPTH = 4096, 64

# Annotations: keywords without rules for values.
_NOTES = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
     "$defs", "definitions", "discriminator"}
)  # fmt: skip
# Keywords by the type they apply to; they do not restrict values of other types.
_OF_TYPE: dict[str, frozenset[str]] = {
    "object": frozenset(
        {"properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
         "maxProperties"}
    ),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
}  # fmt: skip
_OF_TYPE["integer"] = _OF_TYPE["number"]
_DATE = (
    r"[1-9]\d{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    r"|02-(?:0[1-9]|1\d|2[0-8]))"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# Formats, with pdctl's own patterns for those that the compiler enforces only partly: it allows February 31.
_FORMATS: dict[str, str | None] = {
    "date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}", "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
    "duration": None, "uuid": None, "ipv6": None, "hostname": None, "email": None, "uri": None,
}  # fmt: skip
# Each of these must be alone in its node, except for annotations and `type`.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")


def check_schema(schema: Schema, param: str, where: str = "") -> None:
    """Raise ApiError 400 for the first keyword that cannot be enforced, with its location.

    `param`: the request's field; `where`: the schema's location in it, such as `json_schema.schema`.
    """
    _Check(schema, param, where).node(schema, where or "$", 0)
    if not Endings(schema).can_end(schema):
        raise ApiError(400, f"{param}: no answer of finite length fits the schema", param=param)


class _Check:
    """Checks one schema, node by node."""

    def __init__(self, root: Schema, param: str, where: str) -> None:
        self._root = root
        self._param = param
        self._nodes = 0
        self._checked: set[int] = set()

    def node(self, schema: Schema, path: str, depth: int) -> None:
        self._nodes += 1
        if self._nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise self._error(path, f"the schema has more than {_MAX_NODES} parts or is nested too deeply")
        if schema is True:
            return
        if not isinstance(schema, dict):
            raise self._error(path, "must be a schema: an object, or true")
        if id(schema) in self._checked:
            return
        self._checked.add(id(schema))
        rules = [name for name in schema if name not in _NOTES and not name.startswith("x-")]
        alone = [name for name in rules if name in _ALONE]
        if alone:
            self._alone(schema, alone, rules, path, depth)
        else:
            self._typed(schema, rules, path, depth)

    # -- keywords that stand alone -------------------------------------------------------------------------

    def _alone(self, schema: dict[str, Schema], alone: list[str], rules: list[str], path: str, depth: int) -> None:
        name = alone[0]
        allowed = {name, "type"} if name in ("enum", "const") else {name}
        if beside := [other for other in rules if other not in allowed]:
            raise self._error(f"{path}.{beside[0]}", f"{beside[0]!r} beside {name!r} is not supported")
        value = schema[name]
        if name == "$ref":
            self.node(self._target(value, path), path, depth + 1)
        elif name in ("enum", "const"):
            self._values(schema, value if name == "enum" else [value], f"{path}.{name}")
        elif not isinstance(value, list) or not value:
            raise self._error(f"{path}.{name}", "must be a list of schemas")
        else:
            for number, branch in enumerate(value):
                self.node(branch, f"{path}.{name}[{number}]", depth + 1)
            self._branches(name, value, f"{path}.{name}")

    def _branches(self, name: str, branches: list[Schema], path: str) -> None:
        if name == "allOf" and len(branches) > 1:
            raise self._error(path, "'allOf' of more than one schema is not supported")
        if name == "oneOf" and not are_disjoint([self._resolved(branch) for branch in branches]):
            hint = "is supported only where types, or a required property with const, tell the schemas apart; use anyOf"
            raise self._error(path, f"'oneOf' {hint}")

    def _values(self, schema: dict[str, Schema], values: Schema, path: str) -> None:
        if not isinstance(values, list) or not values:
            raise self._error(path, "must be a list of values")
        types = types_of(schema)
        for value in values:
            if types is not None and not any(is_of(value, kind) for kind in types):
                raise self._error(path, f"{json.dumps(value)[:60]} is not of the node's type")

    def _target(self, reference: Schema, path: str) -> Schema:
        found = follow(self._root, reference)
        if found is None:
            message = f"{json.dumps(reference)[:80]} is not supported: it must lead to a place in this schema (#/...)"
            raise self._error(f"{path}.$ref", message)
        return found

    def _resolved(self, schema: Schema) -> Schema:
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = follow(self._root, schema["$ref"])
        return schema

    # -- keywords of a type --------------------------------------------------------------------------------

    def _typed(self, schema: dict[str, Schema], rules: list[str], path: str, depth: int) -> None:
        types = types_of(schema) or {TELLING[name] for name in rules if name in TELLING}
        for kind in types:
            if kind not in _OF_TYPE:
                raise self._error(f"{path}.type", f"{kind!r} is not a JSON Schema type")
        known = set().union(*(_OF_TYPE[kind] for kind in types)) if types else set()
        for name in rules:
            if name != "type" and name not in known:
                because = " without the type that it is for" if any(name in k for k in _OF_TYPE.values()) else ""
                raise self._error(f"{path}.{name}", f"{name!r}{because} is not supported")
        if "object" in types:
            self._object(schema, path, depth)
        if "array" in types:
            self._array(schema, path, depth)
        if "string" in types:
            self._string(schema, path)

    def _object(self, schema: dict[str, Schema], path: str, depth: int) -> None:
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise self._error(f"{path}.properties", "must be an object of schemas")
        for name, inner in properties.items():
            self.node(inner, f"{path}.properties.{name}", depth + 1)
        self._required(schema.get("required", []), properties, path)
        more = schema.get("additionalProperties", False)
        if not isinstance(more, bool):
            if properties:
                raise self._error(
                    f"{path}.additionalProperties", "a schema here, beside 'properties', is not supported"
                )
            self.node(more, f"{path}.additionalProperties", depth + 1)
        self._names(schema, bool(properties), path, depth)

    def _required(self, required: Schema, properties: dict[str, Schema], path: str) -> None:
        names = required if isinstance(required, list) else [None]
        for name in names:
            if name not in properties:
                message = f"'required' names {json.dumps(name)[:60]}, which 'properties' lacks: that is not supported"
                raise self._error(f"{path}.required", message)

    def _names(self, schema: dict[str, Schema], has_properties: bool, path: str, depth: int) -> None:
        """Check rules on names and the number of properties: supported only without other sources of names."""
        patterns = schema.get("patternProperties")
        others = [n for n in ("properties", "additionalProperties", "propertyNames") if n in schema]
        if patterns is not None:
            if not isinstance(patterns, dict) or len(patterns) != 1 or others:
                message = "'patternProperties' is supported with one pattern, and not beside other rules for properties"
                raise self._error(f"{path}.patternProperties", message)
            for pattern, inner in patterns.items():
                self._pattern(pattern, f"{path}.patternProperties")
                self.node(inner, f"{path}.patternProperties.{pattern}", depth + 1)
        if "propertyNames" in schema:
            if others != ["propertyNames"]:
                raise self._error(f"{path}.propertyNames", "'propertyNames' beside other rules is not supported")
            names = schema["propertyNames"]
            if not isinstance(names, dict) or set(names) - {"type"} != {"pattern"}:
                raise self._error(f"{path}.propertyNames", "'propertyNames' is supported with a pattern alone")
            self._pattern(names["pattern"], f"{path}.propertyNames.pattern")
        for name in ("minProperties", "maxProperties"):
            if name in schema and (not has_properties or schema.get("additionalProperties", False) is not False):
                message = f"{name!r} is supported beside 'properties' alone, without additional ones"
                raise self._error(f"{path}.{name}", message)

    def _array(self, schema: dict[str, Schema], path: str, depth: int) -> None:
        if schema.get("uniqueItems", False) is not False:
            raise self._error(f"{path}.uniqueItems", "'uniqueItems' is not supported")
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise self._error(f"{path}.prefixItems", "must be a list of schemas")
        for number, inner in enumerate(first):
            self.node(inner, f"{path}.prefixItems[{number}]", depth + 1)
        items = schema.get("items", True)
        if items is not False or not first:
            self.node(items, f"{path}.items", depth + 1)

    def _string(self, schema: dict[str, Schema], path: str) -> None:
        groups: list[str] = [name for name in ("pattern", "format") if name in schema]
        if length := next((name for name in ("minLength", "maxLength") if name in schema), None):
            groups.append(length)
        if len(groups) > 1:
            raise self._error(f"{path}.{groups[0]}", f"{groups[0]!r} beside {groups[1]!r} is not supported")
        if "format" in schema and str(schema["format"]) not in _FORMATS:
            message = f"format {json.dumps(schema['format'])[:60]} is not supported; these are: "
            raise self._error(f"{path}.format", message + ", ".join(sorted(_FORMATS)))
        if "pattern" in schema:
            self._pattern(schema["pattern"], f"{path}.pattern")

    def _pattern(self, pattern: Schema, path: str) -> None:
        if not isinstance(pattern, str):
            raise self._error(path, "must be a string")
        if reason := unsupported_pattern(pattern):
            raise self._error(path, reason)

    def _error(self, path: str, message: str) -> ApiError:
        return ApiError(400, f"{self._param}: {path}: {message}", param=self._param)


def narrowed(schema: Schema) -> Schema:
    """The schema to compile instead of a checked one. Every value that matches it also matches the original.

    `additionalProperties: true` beside `properties` becomes false: otherwise a name could occur again, written with
    escapes, and parsers take the last one. Formats that the compiler enforces only partly become patterns.
    """
    if isinstance(schema, list):
        return [narrowed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: inner if name in ("const", "enum") else narrowed(inner) for name, inner in schema.items()}
    if isinstance(pattern := found.get("pattern"), str):
        found["pattern"] = without_optional_groups(pattern)
    if isinstance(patterns := found.get("patternProperties"), dict):
        found["patternProperties"] = {without_optional_groups(name): inner for name, inner in patterns.items()}
    if found.get("properties") and found.get("additionalProperties") is True:
        found["additionalProperties"] = False
    name = found.get("format")
    if isinstance(name, str) and (pattern := _FORMATS.get(name)) is not None:
        del found["format"]
        found["pattern"] = without_optional_groups(f"^{pattern}$")
    return found


def without_optional_groups(pattern: str) -> str:
    """The same pattern with (A|) for (A)?, which xgrammar 0.2.8 reads wrongly within JSON strings: ^a(b[0-9]+)?$ lets
    "a1" pass."""
    found, at, in_class = "", 0, False
    while at < len(pattern):
        letter = pattern[at]
        step = 2 if letter == "\\" else 1
        if not in_class and letter == ")" and pattern[at + 1 : at + 2] == "?":
            found += "|)"
            at += 3 if pattern[at + 2 : at + 3] == "?" else 2
            continue
        in_class = letter == "[" or (in_class and letter != "]")
        found += pattern[at : at + step]
        at += step
    return found


def unsupported_pattern(pattern: str) -> str:
    """The part of a regular expression that the compiler would ignore, or "". It refuses other unknown parts itself."""
    escaped = False
    for at, letter in enumerate(pattern):
        if not escaped and letter == "(" and pattern[at + 1 : at + 2] == "?" and pattern[at + 2 : at + 3] != ":":
            return f"{pattern[at : at + 4]!r} in a pattern (look-around, named groups, flags) is not supported"
        escaped = letter == "\\" and not escaped
    return ""


# -- what a schema means ---------------------------------------------------------------------------------------
