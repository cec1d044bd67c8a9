"""`pdctl version`: what is installed here, and in the environments of engines."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdctl import __version__
from pdctl.cli import app

TOPOLOGY = """
[service]
model = "m"
[[engines]]
name = "p"
role = "prefill"
kind = "vllm"
python = "one/bin/python"
[[engines]]
name = "d"
role = "decode"
python = "{two}"
[[engines]]
name = "n"
kind = "sglang"
python = "/nowhere/bin/python"
[[engines]]
name = "a"
kind = "vllm"
url = "http://127.0.0.1:1"
"""


def environment(folder: Path, python: str, **packages: str) -> str:
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {python}\n")
    for name, version in packages.items():
        (folder / f"lib/python3.12/site-packages/{name}-{version}.dist-info").mkdir(parents=True)
    return str(folder / "bin/python")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    environment(tmp_path / "one", "3.12.4", vllm="0.11.0", torch="2.8.0")
    two = environment(tmp_path / "two", "3.11.9", pdctl="0.0.9", torch="2.6.0", transformers="5.17.0")
    path = tmp_path / "pdctl.toml"
    path.write_text(TOPOLOGY.format(two=two))
    return path


def test_every_environment_is_listed(file: Path) -> None:
    done = CliRunner().invoke(app, ["version", "-f", str(file), "--json"])
    found = json.loads(done.stdout)
    assert (found["pdctl"], found["python"], found["is_binary"]) == (__version__, platform.python_version(), False)
    engines = {one.pop("group"): one for one in found["engines"]}
    folder = file.parent
    assert engines == {
        "p": {
            "kind": "vllm", "python": f"{folder}/one/bin/python", "python_version": "3.12.4",
            "packages": {"vllm": "0.11.0", "torch": "2.8.0"},
        },
        "d": {
            "kind": "builtin", "python": f"{folder}/two/bin/python", "python_version": "3.11.9",
            "packages": {"pdctl": "0.0.9", "torch": "2.6.0", "transformers": "5.17.0"},
        },
        "n": {
            "kind": "sglang", "python": "/nowhere/bin/python", "python_version": "", "packages": {"sglang": None},
        },
    }  # fmt: skip
    text = CliRunner().invoke(app, ["version", "-f", str(file)]).stdout
    assert text.startswith(f"pdctl {__version__}, a package, with Python {platform.python_version()}: ")
    assert f"p (vllm): vllm 0.11.0, torch 2.8.0, Python 3.12.4: {folder}/one/bin/python" in text
    assert "n (sglang): sglang not installed, Python: /nowhere/bin/python" in text


def test_without_a_topology_the_environment_of_engines_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PDCTL_FILE", raising=False)
    monkeypatch.setenv("PDCTL_PYTHON", environment(tmp_path / "e", "3.13.1", pdctl="9.9.9"))
    [found] = json.loads(CliRunner().invoke(app, ["version", "--json"]).stdout)["engines"]
    assert (found["python_version"], found["packages"]) == ("3.13.1", {"pdctl": "9.9.9"})


@pytest.mark.parametrize(
    ("text", "said"), [("engines = 3", ""), ("[[engines", "cannot be read"), (None, "does not exist")]
)
def test_a_broken_topology(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "x.toml"
    if text is not None:
        path.write_text(text)
    done = CliRunner().invoke(app, ["version", "-f", str(path), "--json"])
    assert (done.exit_code == 0) == (not said)
    assert said in str(getattr(done.exception, "message", ""))
