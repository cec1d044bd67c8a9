"""The table of verbs agrees with the modules, and a verb's module is imported only when it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from pdctl.cli import app
from pdctl.commands.verbs import VERBS


@pytest.mark.parametrize("name", VERBS)
def test_the_table_has_the_first_sentence_of_the_help(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]  # a group
    assert command.name == name
    words = " ".join(command.help.split())
    assert words.partition(". ")[0].rstrip(".") + "." == VERBS[name].help


_RUN = "import runpy, sys; sys.argv = ['pdctl', *sys.argv[1:]]; runpy.run_module('pdctl', run_name='__main__')"


def run(at_exit: str, words: list[str], folder: Path, **extra: str) -> list[str]:
    """Run `pdctl WORDS` in a folder. Returns the lines that the code at its exit prints."""
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    code = f"import atexit, os, sys; atexit.register(lambda: print('\\n--\\n' + {at_exit})); {_RUN}"
    env = {**os.environ, "PYTHONPATH": path, **extra}
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("\n--\n")[2].splitlines()


@pytest.mark.parametrize(
    ("words", "imported"), [(["--help"], set()), (["--version"], set()), (["key", "--help"], {"setup.key"})]
)
def test_only_the_module_of_the_verb_is_imported(words: list[str], imported: set[str], tmp_path: Path) -> None:
    found = set(run("'\\n'.join(sys.modules)", words, tmp_path))
    assert "pdctl.commands.verbs" in found
    modules = {verb.module for verb in VERBS.values()}
    assert {name for name in modules if f"pdctl.commands.{name}" in found} == imported
    assert "asyncio" not in found


def test_the_help_cuts_no_sentence() -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert all(verb.help in shown for verb in VERBS.values())


def test_a_mistyped_verb_is_corrected() -> None:
    done = CliRunner().invoke(app, ["statsu"])
    assert done.exit_code != 0
    assert "'status'" in done.output


def test_paths_in_variables_are_absolute_for_children(tmp_path: Path) -> None:
    [found] = run("os.environ['PDCTL_RUN']", ["version"], tmp_path, PDCTL_RUN="here")
    assert found == f"{tmp_path}/here"
