"""Every command, option and argument has a help text that is a plain sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

import pytest
import typer.main
from typer.testing import CliRunner

from pdctl.cli import app

# Unclear phrases that help texts must not contain.
_UNCLEAR = (
    "so many", "so often", "again and again", "now so", "one's own", "asked for", "whose", "thereof", "therein",
    "wherein", "whereby", "whatsoever", "heretofore", "hitherto", "is owed", "has owed", "shall", "likewise", "no more",
    "a look", "looks", "looked into", "the whole", "tells", "is told", "are told", "what there is", "there is", "seen",
    "several times", "as long as", "in spite of", "incarnation", "incarnations", "heed", "heeds", "a second;",
)  # fmt: skip
_UNCLEAR_RE = re.compile("|".join(rf"(?<!\w){re.escape(phrase)}(?!\w)" for phrase in _UNCLEAR), re.IGNORECASE)


class _Parameter(Protocol):
    """The used part of a click parameter. Options have a help text, and so do typer's arguments."""

    name: str | None
    help: str | None


class _Command(Protocol):
    """The used part of a click command or group."""

    help: str | None
    params: list[_Parameter]


def _commands(command: _Command, path: str) -> Iterator[tuple[str, _Command]]:
    """The command and its sub-commands, each with its command line."""
    yield path, command
    below: dict[str, _Command] = getattr(command, "commands", {})
    for name, child in below.items():
        yield from _commands(child, f"{path} {name}")


def _root() -> _Command:
    return typer.main.get_command(app)  # type: ignore[return-value]  # typer has its own copy of click


def _texts() -> dict[str, str]:
    """Help texts by command line and parameter."""
    found: dict[str, str] = {}
    for path, command in _commands(_root(), "pdctl"):
        found[path] = command.help or ""
        for parameter in command.params:
            found[f"{path} {parameter.name}"] = parameter.help or ""
    return found


_TEXTS = _texts()


def test_the_walk_reaches_verbs_and_sub_verbs() -> None:
    for words in (
        "pdctl", "pdctl up", "pdctl up detach", "pdctl scale groups", "pdctl bench", "pdctl bench serve speed",
    ):  # fmt: skip
        assert words in _TEXTS


@pytest.mark.parametrize("group", ["", "bench"])
def test_help_names_every_verb_and_each_prints_its_own(group: str) -> None:
    above = group.split()
    shown = CliRunner().invoke(app, [*above, "--help"])
    assert shown.exit_code == 0
    verbs = {words.split()[-1] for words, _ in _commands(_root(), "pdctl") if words.split()[1:-1] == above}
    assert len(verbs) > 5
    for verb in verbs - {"pdctl"}:
        assert verb in shown.stdout
        own = CliRunner().invoke(app, [*above, verb, "--help"])
        assert own.exit_code == 0
        assert "Usage" in own.stdout


@pytest.mark.parametrize("words", _TEXTS)
def test_a_help_text_is_a_sentence(words: str) -> None:
    text = " ".join(_TEXTS[words].split())
    assert re.fullmatch(r"[A-Z].*\.", text), f"{words}: {text!r}"


@pytest.mark.parametrize("words", _TEXTS)
def test_a_help_text_has_no_unclear_phrase(words: str) -> None:
    text = " ".join(_TEXTS[words].split())
    assert not (found := _UNCLEAR_RE.search(text)), f"{words}: {found[0] if found else ''!r} in {text!r}"


@pytest.mark.parametrize("text", ["At most, so many of them.", "Ask whose it is.", "trace: So many times as fast."])
def test_an_unclear_phrase_is_found(text: str) -> None:
    assert _UNCLEAR_RE.search(text)
