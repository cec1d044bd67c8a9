"""`pdctl manual`: the man page, made from the help of every verb."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Protocol, cast

import typer

from pdctl import __version__, console

_ABOUT = "run prefill/decode-disaggregated LLM serving with one command"
_DESCRIPTION = (
    "pdctl reads a topology file (pdctl.toml), makes a plan, and starts and supervises prefill engines, decode engines "
    "and a proxy, pinned to devices. It restarts processes that die, frees the KV that they had leased, and keeps "
    "clients' streams going. Without a topology file it uses a built-in topology for this machine."
)
_FILES = (
    ("./pdctl.toml", "The topology. `pdctl init` writes one with comments."),
    ("$XDG_RUNTIME_DIR/pdctl, else /tmp/pdctl-UID", "Sockets and locks of running services."),
    ("~/.local/state/pdctl", "Logs, events and exit reports of each service."),
    ("~/.cache/pdctl", "Converted models, and what the binary unpacked."),
)
_ENVIRONMENT = (
    ("PDCTL_FILE", "The topology file."),
    ("PDCTL_RUN, PDCTL_STATE, PDCTL_CACHE", "Other folders for the files above."),
    ("PDCTL_PYTHON", "The interpreter of engines and stores whose group names none."),
    ("PDCTL_UNPACK", "The folder into which the binary unpacks itself."),
    ("PDCTL_DEBUG", "If set, an unexpected error prints a traceback."),
    ("NO_COLOR", "If set, the output has no colours."),
)
_CODES = (
    ("0", "Success. Some verbs document other codes in their help."),
    ("1", "An error that the user can fix; stderr says how."),
    ("2", "An unexpected error."),
)
_Record = tuple[str, str]


class _Parameter(Protocol):
    """The used part of a click parameter."""

    hidden: bool

    def get_help_record(self, context: typer.Context) -> _Record | None:
        """Names and help."""


class _Command(Protocol):
    """The used part of a click command or group. typer has its own copy of click, which it does not export."""

    name: str | None
    help: str | None
    hidden: bool

    def get_params(self, context: typer.Context) -> list[_Parameter]:
        """Options and arguments."""

    def collect_usage_pieces(self, context: typer.Context) -> list[str]:
        """The words after the name in a usage line."""


def manual(context: typer.Context) -> None:
    """Print the man page. To read it: `pdctl manual | man -l -`."""
    console.out(page(cast(_Command, context.find_root().command)), end="")


def page(root: _Command) -> str:
    """The man page in the language of man(7)."""
    return "\n".join(_lines(root)) + "\n"


def _lines(root: _Command) -> Iterator[str]:
    yield f'.TH PDCTL 1 "" "pdctl {_plain(__version__)}" "User Commands"'
    yield from (".SH NAME", rf"pdctl \- {_plain(_ABOUT)}")
    yield from (".SH SYNOPSIS", r".B pdctl", r"[\fIOPTIONS\fR] \fICOMMAND\fR [\fIARGUMENTS\fR]")
    yield from (".SH DESCRIPTION", _plain(_DESCRIPTION))
    yield ".SH OPTIONS"
    top = typer.Context(cast(Any, root), info_name="pdctl")
    yield from _records(root, top)
    yield ".SH COMMANDS"
    for command, inner in _below(root, top):
        yield from _command(command, inner)
    for title, records in (("FILES", _FILES), ("ENVIRONMENT", _ENVIRONMENT), ("EXIT STATUS", _CODES)):
        yield f".SH {title}"
        for record in records:
            yield from _record(record)


def _below(command: _Command, context: typer.Context) -> Iterator[tuple[_Command, typer.Context]]:
    """The commands of a group, each followed by its own."""
    for name, child in getattr(command, "commands", {}).items():
        inner = typer.Context(child, info_name=name, parent=cast(Any, context))
        if not child.hidden:
            yield child, inner
            yield from _below(child, inner)


def _command(command: _Command, context: typer.Context) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield rf".SS \fB{_plain(context.command_path)}\fR {_plain(usage)}"
    yield _plain(command.help or "")
    yield from _records(command, context)


def _records(command: _Command, context: typer.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        # Every verb has --help.
        if record is not None and (context.parent is None or not record[0].endswith("--help")):
            yield from _record(record)


def _record(record: _Record) -> Iterator[str]:
    names, text = record
    yield from (".TP", rf"\fB{_plain(names)}\fR", _plain(text))


def _plain(text: str) -> str:
    """Text as man(7) shows it: no character has a meaning."""
    words = " ".join(text.split()).replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"^([.'])", r"\\&\1", words)
