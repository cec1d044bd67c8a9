"""`pdctl plan` for several machines: facts are written, read again, and give a plan of each node."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdctl.cli import app
from pdctl.errors import ConfigError, PdctlError
from pdctl.host.facts import decode_facts, encode_facts
from tests.plan.test_cluster import CLUSTER, node

TEXT = CLUSTER.format(first='nodes = ["a", "z"]', second="replicas = 2", spare=0).replace("10.0.0.0/24", "127.0.0.0/8")


def run(*words: object) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, words)], catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout, result.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pdctl.toml"
    path.write_text(TEXT)
    for number, name in enumerate("ab", 1):
        (tmp_path / f"{name}.json").write_bytes(encode_facts(node(number)))
    return path


def given(file: Path, *names: str) -> list[object]:
    return [word for name in names for word in ("--facts", file.parent / f"{name}.json")]


def test_each_node_s_plan_is_shown_and_unknown_nodes_are_told(file: Path) -> None:
    out, told = run("-f", file, *given(file, "a", "b"))
    lines = out.splitlines()
    assert lines[0] == "service many: sample:tiny-qwen3; 3 engines on 2 nodes"
    assert [line for line in lines if line.startswith("node ")] == [
        "node a: http://10.0.0.1:8000", "node b: http://10.0.0.2:8000",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines if "builtin" in line] == ["prefill-0", "decode-1", "decode-0"]
    assert "the topology names nodes whose facts are not given: z" in told
    plans = json.loads(run("-f", file, "--json", *given(file, "a", "b"))[0])
    assert [[entry["name"] for entry in plans[name]["processes"]] for name in "ab"] == [
        ["prefill-0", "decode-1", "proxy"], ["decode-0", "proxy"],
    ]  # fmt: skip


def test_written_facts_have_the_address_of_the_cluster_and_can_be_read(file: Path) -> None:
    target = file.parent / "c.json"
    out, _ = run("-f", file, "--write-facts", target)
    assert out.startswith(f"{target}: ")
    assert out.endswith("it counts as node c\n")
    assert decode_facts(target.read_bytes()).address.startswith("127.")
    assert "node c: " in run("-f", file, *given(file, "a", "c"))[0]


def test_without_facts_it_tells_how_to_get_them(file: Path) -> None:
    with pytest.raises(PdctlError, match="is for several machines, and none is known") as caught:
        run("-f", file)
    assert "--write-facts" in (caught.value.hint or "")


def test_what_does_not_fit_names_node_and_line(file: Path) -> None:
    file.write_text(TEXT.replace("replicas = 2", "replicas = 2\ncpus = [7]"))
    with pytest.raises(ConfigError) as caught:
        run("-f", file, *given(file, "b", "a"))
    [problem] = caught.value.problems
    assert file.read_text().splitlines()[problem.line - 1] == "cpus = [7]"
    assert problem.message == "node b: CPU 7 does not exist or is not available to pdctl"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none"], "none.json cannot be read"),
        (["a", "a"], "two files are named a"),
        (["broken"], "broken.json: these are not the facts of a machine"),
        (["b"], "prefill-0 may run on a, z, but no such node is there"),
    ],
)
def test_facts_that_are_of_no_use_are_told(file: Path, names: list[str], message: str) -> None:
    (file.parent / "broken.json").write_text("[]")
    with pytest.raises(PdctlError, match=message):
        run("-f", file, *given(file, *names))


def test_facts_are_for_clusters_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[service]\nmodel = "sample:tiny-qwen3"\n[[engines]]\nname = "p"\nrole = "hybrid"\n')
    with pytest.raises(PdctlError, match=r"has no \[cluster\]"):
        run("-f", file, *given(file, "a"))
    file.unlink()
    monkeypatch.chdir(file.parent)
    with pytest.raises(PdctlError, match="--facts needs a topology file"):
        run(*given(file, "a"))


def test_nodes_with_one_address_are_told(file: Path) -> None:
    (file.parent / "b.json").write_bytes(encode_facts(replace(node(2), address="10.0.0.1")))
    assert "some nodes have the same address" in run("-f", file, *given(file, "a", "b"))[1]
