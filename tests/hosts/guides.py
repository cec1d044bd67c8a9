"""The guides for two servers, block by block on two hosts: with other addresses, a tiny model and no GPUs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.docs.blocks import ROOT, Block, blocks
from tests.hosts.lab import Program
from tests.hosts.node import Node
from tests.registry.etcd import BINARY

# Blocks that need hardware, systemd or packages, or would copy files that hosts here share.
_SKIPPED = frozenset({"doctor", "bandwidth", "install", "etcd", "agents", "copy"})
# What is given again: on a busy machine, one member of etcd is too slow at times.
_TOO_SLOW, _TRIES = "etcd does not answer", 5
_ON_B = frozenset({"node"})
_ON_BOTH = frozenset({"firewall", "by-hand"})


class Guide:
    """One page, for node `a` and node `b`. `env`: of all commands."""

    def __init__(self, page: str, a: Node, b: Node, folder: Path) -> None:
        self.page = page
        self.nodes = (a, b)
        self.folder = folder / page.removesuffix(".md")
        self.ran: list[str] = []
        self._programs: list[Program] = []
        programs = self.folder / "bin"
        programs.mkdir(parents=True)
        ray = Path(sys.executable).with_name("ray")
        for name, command in (("pdctl", f"{sys.executable} -m pdctl"), ("ray", str(ray)), ("etcd", str(BINARY))):
            (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (programs / name).chmod(0o755)

    def follow(self) -> None:
        """Execute the page. Raises AssertionError at a command that fails."""
        for block in blocks(ROOT / "docs" / "guides" / self.page):
            if block.kind == "file":
                self._write(block)
            elif block.kind == "run" and block.name not in _SKIPPED:
                self._run(block)
                self.ran.append(block.name)

    def close(self) -> None:
        """End what units would have started."""
        for program in self._programs:
            if program.is_running:
                program.kill()

    def _write(self, block: Block) -> None:
        (self.folder / block.name).write_text(self._local(block.text))
        if block.name.endswith(".service"):
            self._start(block.name, self.nodes[:1])

    def _run(self, block: Block) -> None:
        a, b = self.nodes
        on = self.nodes if block.name in _ON_BOTH else (b,) if block.name in _ON_B else (a,)
        for node in on:
            self._shell(node, block)
        if block.name == "unit":
            text = (self.folder / "pdctl-agent.service").read_text()
            assert "KillMode=process" in text, text

    def _shell(self, node: Node, block: Block) -> None:
        env = {**node.env, "PATH": f"{self.folder / 'bin'}:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"}
        script = f"cd {self.folder}\n{self._local(block.text)}"
        for _ in range(_TRIES):
            done = node.host.run(["bash", "-euo", "pipefail", "-c", script], env, 300)
            if _TOO_SLOW not in done.stderr:
                break
        assert done.returncode == 0, f"{block.label} on {node.name}: {done.stdout}{done.stderr}"

    def _start(self, unit: str, nodes: tuple[Node, ...]) -> None:
        """What systemd would start."""
        text = (self.folder / unit).read_text().replace("\\\n", " ")
        found = re.search(r"^ExecStart=(.*)$", text, re.M)
        assert found, text
        for node in nodes:
            self._programs.append(node.host.start(shlex.split(found[1]), node.folder / f"{unit}.log", node.env))

    def _local(self, text: str) -> str:
        """The same for these hosts."""
        a, b = self.nodes
        changed = {
            "10.0.0.0/24": f"{a.host.address.rpartition('.')[0]}.0/24",
            "10.0.0.1": a.host.address,
            "10.0.0.2": b.host.address,
            "/etc/pdctl": str(self.folder),
            "/opt/engine/bin/python": os.environ.get("PDCTL_PYTHON", sys.executable),
            "/usr/bin/etcd": str(BINARY),
            "/var/lib/etcd-pdctl": str(self.folder / "etcd"),
            "meta-llama/Llama-3.1-8B-Instruct": "sample:tiny-qwen3",
            "max_model_len = 8192": "max_model_len = 2048",
            'device = "cuda"\n': "kv_cache_gb = 0.05\n",
            'backend = "mooncake"\nprotocol = "rdma"\ndevices = ["mlx5_0"]': "lease_s = 10",
            "prefill=5 decode=9": "prefill=2 decode=1",
        }
        for there, here in changed.items():
            text = text.replace(there, here)
        return re.sub(r"^replicas = \d+", "replicas = 1", text, flags=re.M)


def verified(folder: Path) -> str:
    """What systemd's own tool says against the units of a guide; "" for nothing, or without the tool."""
    units = [str(path) for path in folder.glob("*.service")]
    try:
        done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return ""
    ours = [line for line in done.stderr.splitlines() if any(Path(unit).name in line for unit in units)]
    return "\n".join(ours)
