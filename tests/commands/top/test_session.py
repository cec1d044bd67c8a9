"""Keys, orders and the log, on a screen that keeps what is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdctl.commands.top import session, terminal
from pdctl.commands.top.lines import Line
from pdctl.commands.top.session import Session
from pdctl.commands.top.snapshot import Snapshot
from pdctl.errors import PdctlError
from tests.commands.top.made import service


class Feed:
    def __init__(self, log: Path) -> None:
        found = service(1, 1)
        ones = tuple(msgspec.structs.replace(one, log=str(log)) for one in found.processes)
        self.shown = Snapshot(msgspec.structs.replace(found, processes=ones))
        self.version = 0
        self.calls: list[str] = []

    def snapshot(self) -> Snapshot:
        return self.shown

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


class Screen:
    """Presses keys one after another; a function among them is called instead."""

    size = terminal.Size(80, 24)

    def __init__(self, script: list[str | Callable[[], object]]) -> None:
        self.script = script
        self.lines: list[str] = []
        self.shows = 0

    def show(self, lines: list[Line]) -> None:
        self.lines = ["".join(span.text for span in line).rstrip() for line in lines]
        self.shows += 1

    def clear(self) -> None:
        self.lines = []

    def keys(self, wait_s: float) -> list[str]:
        if not self.script:
            return ["q"]
        step = self.script[0]
        if callable(step):
            if step() is not False:
                self.script.pop(0)
            return []
        return [str(self.script.pop(0))]


class Control:
    orders: list[tuple[str, str, bool]] = []  # noqa: RUF012 - the test empties it
    failure: PdctlError | None = None

    def __init__(self, run_dir: Path) -> None: ...

    def act(self, process: str, verb: str, drain: bool = False) -> None:
        if self.failure is not None:
            raise self.failure
        self.orders.append((process, verb, drain))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Screen]:
    log = tmp_path / "decode-0.log"
    log.write_text("\n".join(f"line {n}" for n in range(100)) + "\n")
    Control.orders, Control.failure = [], None
    monkeypatch.setattr(session, "ControlClient", Control)

    def played(*script: Any, feed: Feed | None = None) -> Screen:
        screen = Screen([])
        screen.script = [step if isinstance(step, str) else partial(step, screen) for step in script]

        @contextmanager
        def taken() -> Iterator[Screen]:
            yield screen

        monkeypatch.setattr(terminal, "screen", taken)
        found: Any = feed or Feed(log)
        Session(tmp_path, found).run()
        assert found.calls == ["start", "stop"]
        return screen

    return played


def has(*words: str) -> Callable[[Screen], bool]:
    """Whether the screen shows these: the script goes on when it does."""
    return lambda screen: all(any(word in line for line in screen.lines) for word in words)


def test_restart(play: Callable[..., Screen]) -> None:
    play("down", "r", has("Restart decode-0"), "y", has("decode-0: restarting"))
    assert Control.orders == [("decode-0", "restart", False)]
    play("r", "d", has("prefill-0: restarting after its requests"))
    assert Control.orders[1:] == [("prefill-0", "restart", True)]
    play("r", "n", has("prefill-0 was not restarted"), "x", has("q quit"))
    assert len(Control.orders) == 2


def test_a_refused_restart_says_why(play: Callable[..., Screen]) -> None:
    Control.failure = PdctlError("decode-0 is stopping\x1b[2J")
    play("r", "y", has("prefill-0: not restarted: decode-0 is stopping"))


def test_a_log_is_followed_until_it_is_scrolled(play: Callable[..., Screen], tmp_path: Path) -> None:
    log = tmp_path / "decode-0.log"

    def write(_: Screen) -> None:
        with log.open("a") as file:
            file.write("one more \x1b[31mred\n")

    def is_still(screen: Screen) -> bool:
        assert screen.lines[-2] == "line 98"
        return True

    screen = play(
        "l", has("line 99", "log of prefill-0"), "page-up", "page-down", "up", has("line 98", "1 lines back"),
        write, "x", is_still, "end", has("one more red", "newest lines"), "escape", has("EVENTS"),
    )  # fmt: skip
    assert screen.shows < 20


def test_it_is_drawn_when_something_changed_only(play: Callable[..., Screen], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)
    screen = play(*[lambda screen: None] * 50)
    assert screen.shows == 1
    assert play(*[lambda screen: None] * 3, "ctrl-l", *[lambda screen: None] * 3).shows == 2


def test_suspended_and_continued(play: Callable[..., Screen], monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[str] = []
    monkeypatch.setattr(terminal, "suspend", lambda: stops.append("stop"))
    screen = play("down", "ctrl-z", has("▶ decode-0"))
    assert stops == ["stop"]
    assert screen.shows >= 2
