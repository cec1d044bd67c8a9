"""Lines as a terminal gets them."""

from __future__ import annotations

import io
import os

import pytest
from rich.console import Console
from rich.live import Live

from pdctl.commands.top.lines import Span
from pdctl.commands.top.terminal import Screen, Size, painted


def test_a_line_is_cut_at_the_width_that_is_seen() -> None:
    assert painted([Span("abcdef")], 4, False).plain == "abc…"
    assert painted([Span("abcdef")], 4, True).plain == "abcd"
    assert painted([Span("中文中文")], 5, False).cell_len <= 5, "characters of double width"
    assert painted([Span("● "), Span("▶")], 9, True).plain == "* >"


def test_each_line_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=99, height=99, color_system="standard")
    monkeypatch.setattr(os, "get_terminal_size", lambda fd=0: os.terminal_size((20, 3)))
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        screen = Screen(console, live)
        written.truncate(0)
        screen.show([[Span("one", "bad")], [], [Span("three")]])
        shown = written.getvalue()
    lines = shown.split("\n")
    assert len(lines) == 3, "as many as the terminal has"
    assert "\x1b[1;31mone" in lines[0]
    assert lines[1].strip() == ""
    assert lines[2].startswith("three")


def test_a_terminal_that_does_not_know_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    screen = Screen(console, Live(console=console))
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
    for found in (lambda fd=0: os.terminal_size((0, 0)), lambda fd=0: os.read(-1, 1)):
        monkeypatch.setattr(os, "get_terminal_size", found)
        assert screen.size == Size(80, 24)
