"""What the last word of a command line can be."""

from __future__ import annotations

from typing import Any, cast

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st

from pdctl.cli import app
from pdctl.commands.shell.completion import _split, candidates
from pdctl.commands.shell.slots import Command, slot_of

ROOT = cast(Command, typer.main.get_command(app))


def slot(line: str) -> tuple[str, str | None, str, str]:
    """Of the words after `pdctl`: verb, parameter, word, and what is before it in the same word."""
    found = slot_of(ROOT, line.split(" "))
    return found.verb, found.parameter.name if found.parameter else None, found.word, found.before


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("", ("", None, "", "")),
        ("re", ("", None, "re", "")),
        ("restart ", ("restart", "name", "", "")),
        ("restart dec", ("restart", "name", "dec", "")),
        ("restart decode-0 ", ("restart", None, "", "")),
        ("restart --drain dec", ("restart", "name", "dec", "")),
        ("restart --drain -s t ", ("restart", "name", "", "")),
        ("restart --service ", ("restart", "service", "", "")),
        ("restart --service=t", ("restart", "service", "t", "--service=")),
        ("restart --drain=t", ("restart", None, "--drain=t", "")),  # a flag has no value
        ("restart --dr", ("restart", None, "--dr", "")),
        ("restart -- --dr", ("restart", "name", "--dr", "")),
        ("role decode-0 p", ("role", "wanted", "p", "")),
        ("scale a=1 b=2 c", ("scale", "groups", "c", "")),
        ("bench ", ("bench", None, "", "")),
        ("bench serve --trace", ("bench serve", None, "--trace", "")),
        ("bench serve --data ", ("bench serve", "path", "", "")),
        ("bench compare a.toml ", ("bench compare", "second", "", "")),
        ("nonsense x", ("nonsense", None, "x", "")),
    ],
)  # fmt: skip
def test_slots(line: str, wanted: tuple[str, str | None, str, str]) -> None:
    assert slot(line) == wanted


def test_values_before_the_word_are_known() -> None:
    assert slot_of(ROOT, ["logs", "-s", "t", "--file=x.toml", ""]).chosen == {"service": "t", "file": "x.toml"}


def values(line: str) -> list[str]:
    return [value for kind, value, _ in candidates(slot_of(ROOT, line.split(" "))) if kind == "value"]


def test_verbs_options_and_fixed_words() -> None:
    assert values("re") == ["restart", "recommend"]
    assert sorted(values("bench s")) == ["serve", "sweep"]
    assert values("restart --") == ["--drain", "--wait", "--file", "--service", "--help"]
    assert values("role decode-0 ") == ["prefill", "decode", "hybrid"]
    assert values("doctor rdma g") == ["gpu"]
    assert values("doctor --protocol=t") == ["--protocol=tcp"]
    assert "shm" in values("doctor transfer --transport ")
    assert values("completion f") == ["fish"]
    assert values("nonsense ") == []


@pytest.mark.parametrize(
    ("line", "kind"),
    [("plan -f ", "file"), ("plan --file=/e", "file"), ("init ", "file"), ("bench serve --png ", "folder")],
)
def test_paths_are_completed_by_the_shell(line: str, kind: str) -> None:
    assert [found for found, _, _ in candidates(slot_of(ROOT, line.split(" ")))] == [kind]


def test_every_name_of_a_process_or_service_has_a_source() -> None:
    from pdctl.commands.shell.names import SOURCES

    root: Any = ROOT
    known = {(verb, parameter) for verb, parameter in SOURCES}
    for verb, command in root.commands.items():
        for parameter in command.params:
            if (parameter.help or "").startswith(("Process", "Engine,", "Service name")):
                assert {(verb, parameter.name), ("", parameter.name)} & known, (verb, parameter.name)
    for verb, name in known:
        of_verb = {parameter.name for parameter in root.commands[verb].params} if verb else set()
        assert not verb or name in of_verb, f"{verb} has no {name}"


@given(st.lists(st.text(st.sampled_from("-=ab \t'\"\\restcolhl"), max_size=9), max_size=6))
def test_no_words_are_too_odd(words: list[str]) -> None:
    list(candidates(slot_of(ROOT, words)))
    assert _split(" ".join(words)) is not None


def test_a_line_is_split_as_the_shell_does() -> None:
    assert _split("pdctl restart ") == ["pdctl", "restart", ""]
    assert _split("pdctl logs 'a b") == ["pdctl", "logs", "a b"]
    assert _split("pdctl scale decode=") == ["pdctl", "scale", "decode="]
