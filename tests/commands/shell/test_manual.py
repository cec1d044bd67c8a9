"""The man page has every verb and option, and a real man shows it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from pdctl.cli import app
from pdctl.commands.shell.manual import _plain

KEPT = Path(__file__).parents[3] / "docs/pdctl.1"


def test_the_kept_page_is_the_one_that_is_made() -> None:
    made = CliRunner().invoke(app, ["manual"]).stdout
    assert made == KEPT.read_text(), "make it again: scripts/docs reference"


def _options(command: Any, path: str = "pdctl") -> list[tuple[str, str]]:
    found = [(path, name) for parameter in command.params for name in parameter.opts if name.startswith("--")]
    for name, child in getattr(command, "commands", {}).items():
        found += _options(child, f"{path} {name}")
    return found


def test_every_option_is_in_it() -> None:
    page = KEPT.read_text()
    parts = dict(part.partition("\n")[::2] for part in page.split(".SS \\fB"))
    for path, option in _options(typer.main.get_command(app)):
        if path != "pdctl":
            part = next(text for head, text in parts.items() if head.startswith(f"{_plain(path)}\\fR"))
            assert _plain(option) in part, (path, option)


def test_words_of_the_language_are_plain_text() -> None:
    assert _plain(".TH is\n no-thing \\ here") == r"\&.TH is no\-thing \e here"


def test_man_shows_it_without_a_warning() -> None:
    if shutil.which("man") is None or shutil.which("groff") is None:
        pytest.skip("NOT TESTED: man is not installed")
    done = subprocess.run(
        ["man", "--warnings", "-l", str(KEPT)], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "200", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.stderr == ""
    assert "pdctl restart [OPTIONS] {name}" in done.stdout
    assert "--drain" in done.stdout
