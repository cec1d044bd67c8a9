"""Writes docs/reference from the help of the commands and the schema of topology files. Run by `scripts/docs`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import typer

from pdctl.cli import app
from pdctl.topology.meanings import ABOUT, MEANINGS
from pdctl.topology.schema import LISTS, TABLES, Key

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
_GENERATED = "`scripts/docs` generates this page from {source}; change it there."

_COMMANDS_HEAD = """\
# Commands

{generated}

Every command that talks to a running service finds it by the topology file (`-f FILE`, else `PDCTL_FILE`, else
`./pdctl.toml`) or by its name (`-s NAME`). Without both, it takes the one service that runs.

| variable | meaning |
|---|---|
| `PDCTL_FILE` | the topology file |
| `PDCTL_API_KEY` | the API key that `ask` and `bench` send |
| `PDCTL_RUN` | folder of run files: locks, control sockets; default `$XDG_RUNTIME_DIR/pdctl`, else `/tmp/pdctl-UID` |
| `PDCTL_STATE` | folder of logs, events and exits; default `~/.local/state/pdctl` |
| `PDCTL_CACHE` | folder of converted models and measured speeds; default `~/.cache/pdctl` |
| `PDCTL_ENGINE_KINDS` | `NAME=PACKAGE`: engine kinds of your own |
| `PDCTL_DEBUG` | set: an unexpected error prints its traceback |

Exit codes: 0 success, 1 an error that you can fix, 2 an unexpected error. [`pdctl doctor`](../doctor.md) has its own.
"""

_TOPOLOGY_HEAD = """\
# Topology keys

{generated}

How a file is found and checked, and how devices are chosen: [topology files](../topology.md). `pdctl.toml.example` in
the repository shows every key in its place; `pdctl init` writes a short file for this machine.
"""


class _Parameter(Protocol):
    """The used part of a parameter. typer has its own copy of click, which it does not export."""

    hidden: bool
    param_type_name: str

    def get_help_record(self, context: typer.Context) -> tuple[str, str] | None:
        """Its names and its help."""


class _Command(Protocol):
    """The used part of a command or a group."""

    help: str | None
    hidden: bool

    def get_params(self, context: typer.Context) -> list[_Parameter]:
        """Options and arguments."""

    def collect_usage_pieces(self, context: typer.Context) -> list[str]:
        """The words after the name in a usage line."""


def commands_page() -> str:
    """docs/reference/commands.md."""
    root = cast(_Command, typer.main.get_command(app))
    top = typer.Context(cast(Any, root), info_name="pdctl")
    head = _COMMANDS_HEAD.format(generated=_GENERATED.format(source="the help of each command"))
    return "\n\n".join([head.strip(), *_below(root, top)]) + "\n"


def _below(group: _Command, context: typer.Context) -> Iterator[str]:
    """A section for each command of a group, each followed by its own commands."""
    for name, child in getattr(group, "commands", {}).items():
        if child.hidden:
            continue
        inner = typer.Context(child, info_name=name, parent=cast(Any, context))
        yield _section(child, inner)
        yield from _below(child, inner)


def _section(command: _Command, context: typer.Context) -> str:
    path = context.command_path
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    help_text = "\n".join(line.strip() for line in (command.help or "").splitlines())
    records = [
        record
        for parameter in command.get_params(context)
        if not parameter.hidden and (record := parameter.get_help_record(context)) and "--help" not in record[0]
    ]
    table = [f"| `{_cell(names)}` | {_plain(says)} |" for names, says in records]
    parts = [f"{'#' * (1 + path.count(' '))} {path}", f"```\n{usage}\n```", _prose(help_text)]
    if table:
        parts.append("\n".join(["| | |", "|---|---|", *table]))
    return "\n\n".join(parts)


def _prose(text: str) -> str:
    """Help as Markdown: paragraphs stay, angle brackets are text."""
    return re.sub(r"\n{3,}", "\n\n", text.strip()).replace("<", "\\<")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plain(text: str) -> str:
    """Help in a table. What is in square brackets (a default, a variable) is told apart by its form."""
    found = _cell(text).replace("<", "\\<").replace("*", "\\*")
    return re.sub(r"\[((?:default|env var|required|x|\d).*?)\]", r"*\1*", found)


def topology_page() -> str:
    """docs/reference/topology.md."""
    head = _TOPOLOGY_HEAD.format(generated=_GENERATED.format(source="`pdctl/topology/schema.py` and `meanings.py`"))
    tables = {**TABLES, **LISTS}
    order = sorted(tables, key=lambda name: list(ABOUT).index(name) if name in ABOUT else len(ABOUT))
    sections = [_table(name, tables[name], is_list=name in LISTS) for name in order]
    return "\n\n".join([head.strip(), *sections]) + "\n"


def _table(name: str, keys: dict[str, Key], *, is_list: bool) -> str:
    title = f"[[{name}]]" if is_list else f"[{name}]"
    rows = [
        f"| `{key}` | {_type_of(schema)} | {_default_of(name, key, schema)} | {_cell(MEANINGS[name][key].text)} |"
        for key, schema in keys.items()
    ]
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    # The anchor is the same on GitHub and on the site, which treat brackets in headings differently.
    return "\n\n".join([f"## {name}", f"`{title}`: {ABOUT[name]}", "\n".join([*head, *rows])])


def _type_of(schema: Key) -> str:
    """What a check accepts, from its own message about a value that nothing accepts."""
    message = schema.check(object())
    assert message is not None
    words = message.removeprefix("must be ").partition(" (")[0]
    if words.startswith("one of: "):
        return _cell(" or ".join(f"`{word}`" for word in words.removeprefix("one of: ").split(", ")))
    return _cell(words)


def _default_of(table: str, key: str, schema: Key) -> str:
    if schema.required:
        return "required"
    if said := MEANINGS[table][key].default:
        return _cell(said)
    assert schema.default not in (None, [], {}), f"{table}.{key}: say in meanings.py what applies without the key"
    return f"`{_toml(schema.default)}`"


def _toml(value: object) -> str:
    """A default as it is written in a file; words without their quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).replace("'", '"') if isinstance(value, list) else str(value)


PAGES = {"commands.md": commands_page, "topology.md": topology_page}


def write() -> None:
    """Write the pages again."""
    REFERENCE.mkdir(exist_ok=True)
    for name, made in PAGES.items():
        (REFERENCE / name).write_text(made(), encoding="utf-8")


if __name__ == "__main__":
    write()
