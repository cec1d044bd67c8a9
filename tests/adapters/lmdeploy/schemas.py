"""Validates messages with LMDeploy's own pydantic classes. Runs in an environment that has LMDeploy, without pdctl.

    python schemas.py < [{"class": "CompletionRequest", "body": {...}}, ...]

Writes one line for each: "" or why it is refused. The packages around the classes need torch, so they are not executed:
empty ones with the same paths take their place.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
import types
from collections import deque
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODULES = ("lmdeploy.pytorch.disagg.conn.protocol", "lmdeploy.serve.openai.protocol")
# Handlers take these from the raw body, beside the class: DistServe's fields.
BESIDE = {"migration_request": "MigrationRequest", "with_cache": None, "preserve_cache": None}
# Fields that pdctl sends to every kind. LMDeploy's completions ignore them.
IGNORED = {"CompletionRequest": {"return_token_ids"}, "StreamOptions": set[str]()}


def load() -> dict[str, Any]:
    found: dict[str, Any] = {}
    root = find_spec("lmdeploy")
    assert root is not None
    assert root.submodule_search_locations
    base = Path(root.submodule_search_locations[0]).parent
    for module in MODULES:
        parts = module.split(".")
        for depth in range(1, len(parts)):
            name = ".".join(parts[:depth])
            package = types.ModuleType(name)
            package.__path__ = [str(base.joinpath(*parts[:depth]))]
            sys.modules.setdefault(name, package)
        found |= vars(importlib.import_module(module))
    found |= classes_in(base / "lmdeploy" / "serve" / "proxy" / "proxy.py", "Status", "Node")
    return found


def classes_in(source: Path, *names: str) -> dict[str, Any]:
    """Classes of a module that cannot be imported without the packages of a server."""
    import pydantic

    roles = importlib.import_module("lmdeploy.pytorch.disagg.config").EngineRole
    around = {"deque": deque, "BaseModel": pydantic.BaseModel, "Field": pydantic.Field, "EngineRole": roles,
              "LATENCY_DEQUE_LEN": 15, "__name__": "proxy"}  # fmt: skip
    tree = ast.parse(source.read_text())
    wanted: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    exec(compile(ast.Module(wanted, []), str(source), "exec", dont_inherit=True), around)
    return {name: around[name] for name in names}


def refusal(classes: dict[str, Any], name: str, body: dict[str, Any]) -> str:
    beside = {key: body.pop(key) for key in BESIDE if key in body and name.endswith("CompletionRequest")}
    unknown = body.keys() - classes[name].model_fields.keys() - IGNORED.get(name, set())
    if unknown:
        return f"{name} has no {sorted(unknown)}"
    try:
        classes[name].model_validate(body)
    except ValueError as failure:
        return str(failure)
    for key, value in beside.items():
        if (inner := BESIDE[key]) and (reason := refusal(classes, inner, value)):
            return reason
        if inner is None and value is not True:
            return f"{key} is {value!r}"
    return ""


def main() -> None:
    classes = load()
    for asked in json.load(sys.stdin):
        print(json.dumps(refusal(classes, asked["class"], asked["body"])))


if __name__ == "__main__":
    main()
