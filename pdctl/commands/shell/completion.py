"""`pdctl completion`: shells complete verbs, options, names and files. `answer` is what the scripts call."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from pdctl import console
from pdctl.commands.shell.scripts import SCRIPTS, place_of
from pdctl.commands.shell.slots import Command, Group, Parameter, Slot, options_of, slot_of
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.commands.shell.names import Named


class Shell(StrEnum):
    """Shells that have a completion script."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


assert set(Shell) == set(SCRIPTS)
# Options whose path is a folder.
_FOLDERS = ("pictures", "sysfs_root")


def completion(
    shell: Shell = typer.Argument(..., help="The shell: bash, zsh or fish."),
    install: bool = typer.Option(False, "--install", help="Write the script to the file in which the shell finds it."),
) -> None:
    """Print a shell's completion script, or install it. Verbs, options, services, processes, groups and files are
    completed."""
    if not install:
        console.out(SCRIPTS[shell], end="")
        return
    path = place_of(shell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SCRIPTS[shell], encoding="utf-8")
    except OSError as failure:
        raise PdctlError(f"{path} cannot be written: {failure.strerror}") from failure
    console.out(str(path))
    console.note(_NEXT[shell].format(folder=path.parent))


_NEXT = {
    "bash": "new shells use it if the package bash-completion is installed; else add to ~/.bashrc: "
    'eval "$(pdctl completion bash)"',
    "zsh": "add to ~/.zshrc, before compinit: fpath+=({folder})",
    "fish": "new shells use it",
}


def answer(app: typer.Typer) -> None:
    """Print what can follow the words in argv. Where nothing can, nothing is printed: a shell's line is no place for
    errors."""
    import os

    root = cast(Command, typer.main.get_command(app))
    is_line = os.environ.pop("PDCTL_COMPLETION", "") == "bash"
    words = _split(sys.argv[1])[1:] if is_line and len(sys.argv) == 2 else sys.argv[1:]
    slot = slot_of(root, words)
    try:
        lines = list(candidates(slot))
    except (PdctlError, OSError):
        return
    # Bash completes only the part of a word after the last of these.
    cut = 1 + max(words[-1].rfind(mark) for mark in "=:") if is_line and words else 0
    for kind, value, about in lines:
        text = " ".join(about.split())
        console.out(kind if kind != "value" else f"value\t{value[cut:]}\t{text}")


def _split(line: str) -> list[str]:
    """A shell's line as words; the last one may be incomplete."""
    found: list[str] = []
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        found.extend(lexer)
    except ValueError:  # a quote is still open
        return [*found, lexer.token]
    return [*found, ""] if not line or line[-1].isspace() else found


def candidates(slot: Slot) -> Iterator[tuple[str, str, str]]:
    """(kind, value, description); the kind is "value", or "file" or "folder" for what the shell completes."""
    if slot.parameter is not None:
        yield from _values(slot, slot.parameter)
    elif slot.word.startswith("-"):
        yield from _matching(slot, _options(slot.command))
    elif isinstance(slot.command, Group):
        yield from _matching(slot, _verbs(slot))


def _values(slot: Slot, parameter: Parameter) -> Iterator[tuple[str, str, str]]:
    from pdctl.commands.shell.names import SOURCES

    source = SOURCES.get((slot.verb, parameter.name or "")) or SOURCES.get(("", parameter.name or ""))
    if source is not None:
        yield from _matching(slot, source(slot))
        return
    kind = _type_of(parameter)
    if issubclass(kind, Path):
        yield "folder" if parameter.name in _FOLDERS else "file", "", ""
    elif issubclass(kind, Enum):
        yield from _matching(slot, ((str(choice.value), "") for choice in kind))


def _type_of(parameter: Parameter) -> type:
    """The type of one value of a parameter; `object` if it has no simple one."""
    found = getattr(getattr(parameter, "type_descriptor", None), "annotation", object)
    inner: Sequence[object] = getattr(found, "__args__", ())
    found = inner[0] if inner else found
    return found if isinstance(found, type) else object


def _options(command: Command) -> Iterator[Named]:
    yield from (
        (name, getattr(option, "help", None) or "")
        for name, option in options_of(command)
        if not getattr(option, "hidden", False)
    )
    yield "--help", "Show this message and exit."


def _verbs(slot: Slot) -> Iterator[Named]:
    if not slot.verb:
        from pdctl.commands.verbs import VERBS

        yield from ((name, verb.help) for name, verb in VERBS.items())
        return
    assert isinstance(slot.command, Group)
    for name, command in slot.command.commands.items():
        yield name, str(getattr(command, "help", None) or "").partition(". ")[0]


def _matching(slot: Slot, found: Iterable[Named]) -> Iterator[tuple[str, str, str]]:
    yield from (("value", slot.before + value, about) for value, about in found if value.startswith(slot.word))
