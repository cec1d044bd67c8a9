"""Every `pdctl ...` that a page mentions is a command, with options that it has; every topology has keys that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from pdctl.cli import app
from pdctl.topology.schema import LISTS, TABLES
from tests.docs.blocks import ROOT

_ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in _ROOT_PAGES)]
_INLINE = re.compile(r"`(pdctl [^`]+)`")
_LINE = re.compile(r"^\s*(?:\$ )?(?:\S+=\S+ )*(pdctl [a-z].*?)(?:\s+#.*)?$")
# Words that stand for others, and what follows a command on its line.
_END = re.compile(r"\s(?:&&|\|\||\||>|&|;)(?:\s|$)")


def mentions(text: str) -> list[str]:
    """The command lines of a page, in blocks and within sentences."""
    found: list[str] = []
    in_block = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            in_block = not in_block
        elif in_block and (command := _LINE.match(line)):
            found.append(command[1])
        elif not in_block:
            found += [one.replace("\\|", "|") for one in _INLINE.findall(line)]
    return found


def wrong(mention: str) -> str:
    """What is wrong with a command line, or nothing."""
    command: Any = typer.main.get_command(app)
    # Shells end a command before these; prose and placeholders have other brackets.
    words = re.sub(r"[\[\]()\"']", " ", _END.split(mention)[0]).split()[1:]
    while words and (inner := getattr(command, "commands", {}).get(words[0])):
        command, words = inner, words[1:]
    if getattr(command, "commands", None) and words and re.fullmatch(r"[a-z]+", words[0]):
        return f"there is no command {words[0]}"
    context = typer.Context(cast(Any, command))
    parameters = command.get_params(context)
    options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    asked = [word.partition("=")[0].rstrip(".,:") for word in words if re.match(r"--?[a-z]", word)]
    unknown = [name for name in asked if name not in {*options, "-h"}]
    return f"no option {unknown[0]}" if unknown else ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path: Path) -> None:
    told = {mention: problem for mention in mentions(path.read_text()) if (problem := wrong(mention))}
    assert not told


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_exist(path: Path) -> None:
    """In every TOML block, also of those that show only a part."""
    schema = {**TABLES, **LISTS}
    for block in re.findall(r"^```toml\n(.*?)^```", path.read_text(), re.M | re.S):
        for name, tables in tomllib.loads(block).items():
            assert name in schema, f"[{name}]"
            for table in tables if isinstance(tables, list) else [tables]:
                assert set(table) <= set(schema[name]), f"[{name}] has no {set(table) - set(schema[name])}"


def test_a_wrong_command_is_found() -> None:
    assert wrong("pdctl stat") == "there is no command stat"
    assert wrong("pdctl status --jason") == "no option --jason"
    assert wrong("pdctl bench serve --rat 4") == "no option --rat"
    assert not wrong("pdctl bench serve --rate 4 > out.txt")
    assert mentions("Type `pdctl up -d`.\n```\n$ pdctl down    # stop\nother\n```\n") == ["pdctl up -d", "pdctl down"]
