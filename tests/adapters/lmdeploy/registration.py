"""Runs LMDeploy's own code that registers an engine at its proxy: the function, from its source.

    python registration.py FOLDER_OF_LMDEPLOY < {"proxy_url": ..., "api_server_url": ..., "model_name": ..., "role": 3}

Writes what LMDeploy would log. Its module imports torch and the engine; the function itself needs `requests` only, so
it is compiled alone, with what it calls.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class HTTPException(Exception):
    """FastAPI's, as far as it is used."""

    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(f"{status_code}: {detail}")


def function(source: Path, name: str, around: dict[str, Any]) -> Any:
    """A function of a source file, with the names in `around`."""
    tree = ast.parse(source.read_text())
    [found] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    [later] = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([later, found], []), str(source), "exec"), around)
    return around[name]


def main() -> None:
    folder, asked = Path(sys.argv[1]) / "serve" / "openai", json.load(sys.stdin)
    log = SimpleNamespace(info=print, error=print)
    around: dict[str, Any] = {"logger": log, "HTTPException": HTTPException}
    function(folder / "utils.py", "get_model_list", around)
    register = function(folder / "api_server.py", "register_to_proxy", around)
    engine = SimpleNamespace(engine=SimpleNamespace(), model_name=asked["model_name"])
    config = SimpleNamespace(role=SimpleNamespace(value=asked["role"]), adapters=["lora"])
    register(
        SimpleNamespace(
            async_engine=engine, engine_config=config, proxy_url=asked["proxy_url"],
            api_server_url=asked["api_server_url"],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
