"""The blocks of code in README and guides, and what each is: `<!-- run: NAME -->`, `<!-- file: NAME -->` or
`<!-- output -->` on the line before it. NAME is unique on its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_MARK = re.compile(r"<!-- (run|file|output)(?:: ([A-Za-z0-9._-]+))? -->")
_FENCE = re.compile(r"(\s*)```(\w*)$")

GPUS = "needs GPUs: scripts/gpu runs the builtin engine on one, by hand"
NETWORK = "installs packages from the network: scripts/release installs the wheel, scripts/demo the rest"
DEVICES = "needs RDMA devices: tests/doctor runs it over trees of fake ones"
HOSTS = "needs two hosts with RDMA"
SEVERAL = "needs two hosts: scripts/try-ray executes it in two namespaces"
SYSTEMD = "needs systemd: scripts/try-ray starts what the unit says, in two namespaces"
# Blocks that no test executes, each with the reason. Their topologies are planned over fake GPUs nevertheless.
EXCEPTED = {
    "README.md: install": NETWORK,
    "README.md: clone": "scripts/test is what runs this test; scripts/demo sets up like it",
    "README.md: gpu": GPUS,
    "README.md: rdma": DEVICES,
    "first-five-minutes.md: install": NETWORK,
    "two-gpus.md: install-cuda": NETWORK,
    "two-gpus.md: install-vllm": NETWORK,
    "two-gpus.md: builtin-up": GPUS,
    "two-gpus.md: vllm-up": GPUS,
    "two-gpus.md: compare": GPUS,
    "rdma.md: devices": DEVICES,
    "rdma.md: bandwidth": HOSTS,
    "rdma.md: vllm-serve": HOSTS,
    "rdma.md: attach-up": HOSTS,
    "two-servers.md: bandwidth": HOSTS,
    "two-servers.md: install": NETWORK,
    "two-servers.md: etcd": SYSTEMD,
    "two-servers.md: copy": SEVERAL,
    "two-servers.md: firewall": SEVERAL,
    "two-servers.md: agents": SYSTEMD,
    "two-servers.md: by-hand": SEVERAL,
    "two-servers.md: up": SEVERAL,
    "two-servers.md: ask": SEVERAL,
    "two-servers.md: daily": SEVERAL,
    "two-servers.md: down": SEVERAL,
    "two-servers-ray.md: install": NETWORK,
    "two-servers-ray.md: head": SEVERAL,
    "two-servers-ray.md: node": SEVERAL,
    "two-servers-ray.md: up": SEVERAL,
    "two-servers-ray.md: again": SEVERAL,
    "two-servers-ray.md: down": SEVERAL,
}


class Block(NamedTuple):
    """A block of code. `kind`: run, file, output, or empty if it has no mark."""

    page: str
    line: int
    kind: str
    name: str
    language: str
    text: str

    @property
    def label(self) -> str:
        """Its name in EXCEPTED."""
        return f"{self.page}: {self.name}"


def pages() -> list[Path]:
    """The pages whose commands are executed."""
    return [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]


def blocks(path: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    begin: int | None = None
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence is None:
            continue
        if begin is None:
            begin = number
            continue
        yield _block(path.name, lines, begin, number)
        begin = None
    assert begin is None, f"{path}:{begin}: a block without an end"


def _block(page: str, lines: list[str], begin: int, end: int) -> Block:
    mark = _MARK.fullmatch(lines[begin - 1].strip()) if begin else None
    fence = _FENCE.match(lines[begin])
    assert fence is not None
    kind, name = (mark[1], mark[2] or "") if mark else ("", "")
    text = "\n".join(line.removeprefix(fence[1]) for line in lines[begin + 1 : end])
    return Block(page, begin + 1, kind, name, fence[2], text + "\n")
