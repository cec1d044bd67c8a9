"""docs/where.md names files and functions that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
_MENTION = re.compile(r"`([^`]+)`")


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions and classes of a module; methods also as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}.{method.name}" for method in methods}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
    return frozenset(found)


def test_every_file_and_name_exists() -> None:
    text = (REPOSITORY / "docs/where.md").read_text()
    questions = re.findall(r"^\*\*\d+\.", text, re.MULTILINE)
    assert len(questions) >= 10
    path: Path | None = None
    checked = 0
    for mention in _MENTION.findall(text):
        if mention.endswith(".py"):
            path = REPOSITORY / "pdctl" / mention
            assert path.is_file(), mention
        elif path is not None and not mention.startswith("pdctl"):
            assert mention in names_in(path), f"{mention} in {path}"
            checked += 1
    assert checked >= 20
