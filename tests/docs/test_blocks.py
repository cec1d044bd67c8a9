"""Every block of README and guides is executed, a file, or named as an exception; topologies can be planned."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.host import Host
from pdctl.plan import make_plan
from pdctl.plan.cluster import place
from pdctl.topology.loader import load_file, load_imagined
from tests.docs.blocks import EXCEPTED, Block, blocks, pages
from tests.plan.test_examples import VERSIONS, host

ALL = [block for page in pages() for block in blocks(page)]
TOPOLOGIES = [block for block in ALL if block.language == "toml"]


def test_every_block_says_what_it_is() -> None:
    unmarked = [f"{block.page}:{block.line}" for block in ALL if not block.kind]
    assert not unmarked, "put <!-- run: NAME -->, <!-- file: NAME --> or <!-- output --> before them"
    assert all(block.name for block in ALL if block.kind != "output")


def test_names_are_unique() -> None:
    labels = [block.label for block in ALL if block.kind == "run"]
    assert len(labels) == len(set(labels))


def test_output_has_no_commands() -> None:
    """What looks like a command would never be run."""
    shown = [block for block in ALL if block.kind == "output" and re.search(r"^(\$ )?pdctl [a-z]", block.text, re.M)]
    assert not [f"{block.page}:{block.line}" for block in shown]


def test_exceptions_exist() -> None:
    labels = {block.label for block in ALL if block.kind == "run"}
    assert set(EXCEPTED) <= labels, "names of blocks that are gone"
    assert all(EXCEPTED.values())


def test_topologies_are_files() -> None:
    assert all(block.kind == "file" for block in TOPOLOGIES)


@pytest.mark.parametrize("block", TOPOLOGIES, ids=lambda block: f"{block.page}-{block.name}")
def test_topologies_can_be_planned(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one or two machines with eight GPUs, with the interpreters and key files that the page has made before."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for python in re.findall(r'^python = "~/(.*)"', block.text, re.M):
        (tmp_path / python).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / python).touch(mode=0o755)
    (tmp_path / "engines.key").write_text("secret\n")
    key = [sys.executable, "-m", "pdctl", "key", "team-a", "--file", str(tmp_path / "keys.txt")]
    subprocess.run(key, check=True, capture_output=True, timeout=60)
    path = tmp_path / block.name
    path.write_text(block.text)
    kinds = re.findall(r'^kind = "(\w+)"', block.text, re.M)
    on: Host = host(tmp_path, kinds[0] if kinds else "builtin")
    if not kinds:
        on = replace(on, package_in=lambda python, names: None)
    assert VERSIONS
    if "[cluster]" in block.text:
        plans = place(load_imagined(path), {"a": on, "b": on})
        assert all({spec.role for spec in plan.processes} == {"prefill", "decode", "proxy"} for plan in plans.values())
        return
    plan = make_plan(load_file(path, on), on)
    assert {spec.role for spec in plan.processes} | {far.role for far in plan.attached} >= {"proxy"}
