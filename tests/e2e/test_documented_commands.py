"""The commands of README and guides, executed page by page, with a tiny model. Exceptions: tests/docs/blocks.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import EXCEPTED, ROOT, Block, blocks, pages
from tests.service import Run, free_port

pytestmark = pytest.mark.e2e

# Pages that speak of a service that runs already.
SERVED = ("upgrade.md", "3am.md")
# What must have happened before a block, because the page speaks of a bad night.
BEFORE = {
    "3am.md: dies": "kill -9 $(pdctl status --json | python3 -c 'import json, sys\n"
    'print(next(p["pid"] for p in json.load(sys.stdin)["processes"] if p["name"] == "decode-0"))\')\n'
    "until pdctl why decode-0 | grep -q SIGKILL; do sleep 0.2; done",
    "3am.md: start": "pdctl stop decode-0",
    "3am.md: cut": "kill -9 $(pdctl status --json | python3 -c 'import json, sys\n"
    'print(next(p["pid"] for p in json.load(sys.stdin)["processes"] if p["name"] == "proxy"))\')\n'
    "until pdctl why proxy | grep -q SIGKILL; do sleep 0.2; done",
}
WITH_COMMANDS = [page for page in pages() if any(block.kind == "run" for block in blocks(page))]
# scripts/slow runs these too.
QUICK = ("first-five-minutes.md", "rdma.md")


class Page:
    """A page's shell: a folder of its own, `pdctl` and `python3` in PATH."""

    def __init__(self, run: Run) -> None:
        self.folder = run.folder
        self.ports = {"8000": str(free_port()), "8001": str(free_port())}
        programs = run.folder / "bin"
        programs.mkdir()
        for name, command in (("pdctl", f"{sys.executable} -m tests.docs.typed"), ("python3", sys.executable)):
            (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (programs / name).chmod(0o755)
        self.env = {
            **run.env,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DOCUMENTED_PORT": self.ports["8000"],
        }

    def run(self, text: str, what: str, language: str = "") -> str:
        """The output of a script; a command of it that fails is an error."""
        for port, instead in self.ports.items():
            text = text.replace(port, instead)
        # A model's name for clients is the last part of its name in the topology.
        text = text.replace('model="gemma-3-270m"', 'model="tiny-qwen3"')
        words = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            words, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{what}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def take(self, block: Block) -> None:
        """Write a file, or run a block."""
        if block.kind == "file":
            (self.folder / block.name).write_text(block.text)
        elif block.kind == "run" and block.label not in EXCEPTED:
            if before := BEFORE.get(block.label):
                self.run(before, f"before {block.label}")
            self.run(block.text, f"{block.page}:{block.line}", block.language)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.name, marks=() if path.name in QUICK else pytest.mark.slow)
        for path in WITH_COMMANDS
    ],
)
def test_commands_of(path: Path, run: Run) -> None:
    page = Page(run)
    try:
        if path.name in SERVED:
            page.run("pdctl init\npdctl up -d", "a service")
        for block in blocks(path):
            page.take(block)
    finally:
        run.cli("down", "--now")
    assert not run.processes()
