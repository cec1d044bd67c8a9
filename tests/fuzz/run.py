"""`scripts/fuzz`: generated requests, bytes, topologies and command lines. None may cause a crash, a 500 or silence.

python -m tests.fuzz.run ST [--seed N] [--seconds N] [--parts api,http,toml,cli]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import command_lines, hostile_http, topologies
from tests.service import Service, running, temporary_run, topology

# The answer to valid data depends on more than single fields (a prompt's length in tokens, two fields that exclude each
# other): 400 with a reason is accepted like 200.
_CONFIG = """\
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400"]
"""
_API_S = 900


def main() -> int:
    """Returns 0 if there is no finding."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz")
    parser.add_argument("schemathesis", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--parts", default="toml,cli,http,api")
    options = parser.parse_args()
    found: list[str] = []
    parts = options.parts.split(",")
    alone: dict[str, Callable[[int, float], list[str]]] = {"toml": topologies.walk, "cli": command_lines.walk}
    for name, walk in alone.items():
        if name in parts:
            found += _told(name, walk(options.seed, options.seconds))
    if {"http", "api"} & set(parts):
        with temporary_run() as run, running(run, topology("sample:tiny-chat", max_model_len=512)) as service:
            before = {engine.name: engine.epoch for engine in service.engines()}
            if "http" in parts:
                found += _told("http", hostile_http.walk(service, options.seed, options.seconds))
            if "api" in parts:
                found += _told("api", _schemathesis(options.schemathesis.absolute(), service, options))
            after = {engine.name: engine.epoch for engine in service.engines()}
            if before != after:
                found.append("engines died: see the logs above")
                sys.stdout.write(run.cli("logs", "-p").stdout[-8000:])
            service.idle()
    sys.stdout.write(f"{len(found)} findings\n")
    return 1 if found else 0


def _told(part: str, found: list[str]) -> list[str]:
    sys.stdout.write(f"== {part}: {len(found) or 'no'} findings\n" + "".join(f"{one}\n" for one in found[:40]))
    sys.stdout.flush()
    return found


def _schemathesis(st: Path, service: Service, options: argparse.Namespace) -> list[str]:
    """Run schemathesis with all phases and checks."""
    folder = service.run.folder
    (folder / "schemathesis.toml").write_text(_CONFIG)
    argv = [
        str(st), "run", f"{service.url}/openapi.json", "--checks", "all", "--continue-on-failure",
        "--max-examples", str(options.examples), "--seed", str(options.seed), "--request-timeout", "60",
        "--no-color",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, timeout=_API_S, check=False, stdin=subprocess.DEVNULL,
            env={**os.environ, "SCHEMATHESIS_HOOKS": ""},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [f"schemathesis has not ended within {_API_S} s"]
    sys.stdout.write(done.stdout[-6000:])
    return [] if done.returncode == 0 else [f"schemathesis ended with {done.returncode}: {done.stderr[-2000:]}"]


if __name__ == "__main__":
    raise SystemExit(main())
