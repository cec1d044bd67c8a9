"""What one node of a JSON Schema says: its types, its constants, where it refers to, and whether its values can end."""

from __future__ import annotations

import json
from collections.abc import Iterator

# A JSON Schema, or a part of one, as parsed JSON.
Schema = object

# Keywords that imply the type.
TELLING = {"properties": "object", "items": "array", "prefixItems": "array"}


def types_of(schema: dict[str, Schema]) -> set[str] | None:
    """The types of a node; None if it has no `type`."""
    named = schema.get("type")
    if named is None:
        return None
    return {str(kind) for kind in named} if isinstance(named, list) else {str(named)}


def is_of(value: Schema, kind: str) -> bool:
    """Whether a JSON value is of a JSON Schema type."""
    if kind in ("integer", "number"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return not isinstance(value, bool) and (whole if kind == "integer" else isinstance(value, int | float))
    kinds: dict[str, type] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return kind in kinds and isinstance(value, kinds[kind])


def follow(root: Schema, reference: Schema) -> Schema | None:
    """The target of a reference into the schema (RFC 6901); None if there is none."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    found = root
    for step in reference.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            return None
        found = found[name]
    return found


def are_disjoint(branches: list[Schema]) -> bool:
    """Whether no value can match two branches, judged by types and constants."""
    pairs = [(a, b) for number, a in enumerate(branches) for b in branches[:number]]
    return all(_differ(a, b) for a, b in pairs)


def _differ(a: Schema, b: Schema) -> bool:
    if not isinstance(a, dict) or not isinstance(b, dict):
        return False
    ours, theirs = _constants(a), _constants(b)
    if ours is not None and theirs is not None:
        return not ours & theirs
    kinds, others = _wide_types(a), _wide_types(b)
    if kinds and others and not kinds & others:
        return True
    return any(
        not mine & other
        for name, mine in _told_apart_by(a)
        for other_name, other in _told_apart_by(b)
        if name == other_name
    )


def _wide_types(schema: dict[str, Schema]) -> set[str]:
    """A node's types, with integer counted as number."""
    types = types_of(schema) or {TELLING[name] for name in schema if name in TELLING}
    return {"number" if kind == "integer" else kind for kind in types}


def _told_apart_by(schema: dict[str, Schema]) -> Iterator[tuple[str, set[str]]]:
    """Required properties with a limited set of values."""
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        for name in required:
            inner = properties.get(name)
            if isinstance(inner, dict) and (found := _constants(inner)) is not None:
                yield name, found


def _constants(schema: dict[str, Schema]) -> set[str] | None:
    if "const" in schema:
        return {json.dumps(schema["const"], sort_keys=True)}
    values = schema.get("enum")
    return {json.dumps(value, sort_keys=True) for value in values} if isinstance(values, list) else None


class Endings:
    """Checks whether a schema has finite values: one that requires itself has none."""

    def __init__(self, root: Schema) -> None:
        self._root = root

    def can_end(self, schema: Schema, above: frozenset[int] = frozenset()) -> bool:
        """Whether a node has a finite value. `above`: the nodes that it is a part of."""
        if not isinstance(schema, dict):
            return True
        if id(schema) in above:
            return False
        above |= {id(schema)}
        if "$ref" in schema:
            return self.can_end(follow(self._root, schema["$ref"]), above)
        for name in ("anyOf", "oneOf", "allOf"):
            if isinstance(branches := schema.get(name), list):
                return any(self.can_end(branch, above) for branch in branches)
        return all(self.can_end(inner, above) for inner in _demanded(schema))


def _demanded(schema: dict[str, Schema]) -> Iterator[Schema]:
    """Schemas of the parts that every value must have."""
    types = types_of(schema)
    if types is not None and len(types) > 1:
        return
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        yield from (properties[name] for name in required if name in properties)
    least = schema.get("minItems", 0)
    if isinstance(least, int) and least > 0:
        first = schema.get("prefixItems")
        yield from first[:least] if isinstance(first, list) else ()
        if least > (len(first) if isinstance(first, list) else 0):
            yield schema.get("items", True)
