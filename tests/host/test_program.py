"""Both ways in which pdctl can have been started."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pdctl.errors import PdctlError
from pdctl.host import program, read_host
from pdctl.plan.interpreter import interpreter_of

SHIM = Path("/lib/spawn_shim.py")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def binary(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "/opt/pdctl")
    monkeypatch.delenv(program.PYTHON_ENV, raising=False)
    return "/opt/pdctl"


def test_from_pip_all_parts_run_under_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(program.PYTHON_ENV, raising=False)
    python = sys.executable
    assert program.pdctl("up", "-d") == [python, "-m", "pdctl", "up", "-d"]
    assert program.part("pdctl.supervisor", "x") == [python, "-m", "pdctl.supervisor", "x"]
    assert program.spawn_shim(SHIM, "1") == [python, "-I", "-S", str(SHIM), "1"]
    assert program.engine_python() == python
    assert program.this_engine("core", "x") == [python, "-m", "pdctl.engine", "core", "x"]
    assert read_host().python == read_host().program == python
    assert program.lasting("up") == program.pdctl("up")


def test_the_binary_executes_itself_and_has_no_python_for_engines(
    binary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program.pdctl("up", "-d") == [binary, "up", "-d"]
    assert program.part("pdctl.supervisor", "x") == [binary, "-m", "pdctl.supervisor", "x"]
    assert program.spawn_shim(SHIM, "1") == [binary, "-m", "pdctl.supervisor.process.spawn_shim", "1"]
    monkeypatch.setenv(program.FILE_ENV, "/usr/local/bin/pdctl")
    assert program.lasting("up") == ["/usr/local/bin/pdctl", "up"], "the unpacked files may be removed"
    assert program.engine_python() == ""
    assert (read_host().python, read_host().program) == ("", binary)
    with pytest.raises(PdctlError, match="preparing m needs pdctl's engine") as refused:
        interpreter_of(None, "preparing m")
    assert "pip install 'pdctl[engine]'" in (refused.value.hint or "")


def test_a_variable_names_the_interpreter_of_engines(binary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(program.PYTHON_ENV, "~/engine/bin/python")
    assert program.engine_python() == str(Path.home() / "engine/bin/python")
    assert interpreter_of(None, "x") == program.engine_python()
    assert program.part("pdctl.proxy")[0] == binary, "the control plane still runs under the binary"


def test_the_entry_of_the_binary_takes_parts_of_the_control_plane_only() -> None:
    entry = [sys.executable, str(REPOSITORY / "scripts/_binary/entry.py")]
    version = subprocess.run([*entry, "--version"], capture_output=True, text=True, check=True)
    part = subprocess.run([*entry, "-m", "pdctl", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == part.stdout
    assert part.stdout.startswith("pdctl ")
    config = subprocess.run([*entry, "-m", "pdctl.proxy", "--config", "/none"], capture_output=True, text=True)
    assert "/none" in config.stderr
    refused = subprocess.run([*entry, "-m", "pdctl.engine", "serve"], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "PDCTL_PYTHON" in refused.stderr


def test_the_entry_gives_children_their_own_library_path_back() -> None:
    """The freezer's loader sets a path of its own, with which an engine's Python would load the binary's libraries."""
    code = f"""
import json, os, sys
sys.path.insert(0, {str(REPOSITORY / "scripts/_binary")!r})
import entry
entry.restore_library_path()
print(json.dumps(os.environ.get("LD_LIBRARY_PATH")))
"""
    for before, after in (({"LD_LIBRARY_PATH_ORIG": "/user"}, "/user"), ({}, None)):
        env = {"LD_LIBRARY_PATH": "/binary", "PATH": "/usr/bin:/bin", **before}
        done = subprocess.run([sys.executable, "-I", "-c", code], env=env, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == after


def _asks_which_python_runs(source: str) -> bool:
    """Whether a module reads sys.executable, under any name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("executable", "_base_executable", "orig_argv"):
            if isinstance(node.value, ast.Name) and node.value.id != "program":
                return True
        elif isinstance(node, ast.ImportFrom) and node.module == "sys" and "executable" in {a.name for a in node.names}:
            return True
    return False


def test_one_place_knows_how_pdctl_was_started() -> None:
    """A command line made elsewhere would start the binary with the arguments of an interpreter."""
    asking = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "pdctl").rglob("*.py")
        if _asks_which_python_runs(path.read_text())
    }
    assert asking == {"pdctl/host/program.py"}


@pytest.mark.parametrize(
    "source", ["import sys\nx = [sys.executable]", "import sys as s\ns.executable", "from sys import executable"]
)
def test_the_search_finds_others(source: str) -> None:
    assert _asks_which_python_runs(source)
