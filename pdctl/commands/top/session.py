"""One session of `pdctl top`: reads keys, carries out what they order, and draws."""

from __future__ import annotations

import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pdctl.commands.top import terminal
from pdctl.commands.top.board import Shown, frame, wrapped
from pdctl.commands.top.feed import Feed
from pdctl.commands.top.lines import Span, clean
from pdctl.commands.top.table import Row, in_order, rows_of
from pdctl.commands.top.terminal import Screen, Size
from pdctl.commands.top.view import MOST_LINES, Action, Page, View, pressed
from pdctl.control_api import ControlClient
from pdctl.errors import PdctlError
from pdctl.supervisor.process.logs import tail

_TICK_S = 0.2
# A message is shown this long, seconds.
_MESSAGE_S = 6.0
_LOG_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What the screen was drawn from: it is drawn again when this changes."""

    version: int
    view: View
    message: Span
    second: int
    size: Size
    log: tuple[str, ...]


class Session:
    """Everything that one run of `pdctl top` remembers, also while it is suspended."""

    def __init__(self, run_dir: Path, feed: Feed) -> None:
        self._control, self._feed = ControlClient(run_dir), feed
        self._view = View()
        self._message, self._message_until = Span(""), 0.0
        self._log: tuple[str, ...] = ()
        self._log_version = ("", 0, 0)
        # Answers of the supervisor to orders. Orders are few, and each has one.
        self._answers: queue.Queue[Span] = queue.Queue(maxsize=16)
        self._rows: list[Row] = []
        self._drawn: _Drawn | None = None

    def run(self) -> None:
        """Until the user quits."""
        self._feed.start()
        try:
            while self._on_screen() == "suspend":
                terminal.suspend()
        finally:
            self._feed.stop()

    def _on_screen(self) -> str:
        """Take the screen until the user quits or suspends; which of them."""
        self._drawn = None
        with terminal.screen() as screen:
            while True:
                self._draw(screen)
                for key in screen.keys(_TICK_S):
                    action = self._press(key, screen.size)
                    if action is not None and action.kind in ("quit", "suspend"):
                        return action.kind
                    if action is not None:
                        self._carry_out(action, screen)

    def _press(self, key: str, size: Size) -> Action | None:
        room = size.height - 2
        most_back = max(0, len(wrapped(self._log, size.width)) - room)
        self._view, action = pressed(self._view, key, self._rows, room, most_back)
        self._say(Span(""))
        return action

    def _carry_out(self, action: Action, screen: Screen) -> None:
        if action.kind == "redraw":
            screen.clear()
            self._drawn = None
        elif action.kind == "say":
            self._say(Span(action.text, "busy"))
        else:
            self._say(Span(f"{action.process}: asking for a restart ...", "busy"))
            threading.Thread(target=self._restart, args=(action,), daemon=True).start()

    def _restart(self, action: Action) -> None:
        """Ask the supervisor. In a thread: it may take seconds to answer."""
        try:
            self._control.act(action.process, "restart", action.drain)
            answer = Span(f"{action.process}: restarting" + (" after its requests" if action.drain else ""), "good")
        except PdctlError as failure:
            answer = Span(clean(f"{action.process}: not restarted: {failure.message}"), "bad")
        self._answers.put(answer, timeout=_MESSAGE_S)

    def _say(self, message: Span) -> None:
        self._message, self._message_until = message, time.monotonic() + _MESSAGE_S

    def _draw(self, screen: Screen) -> None:
        """Draw what has changed since."""
        while not self._answers.empty():
            self._say(self._answers.get_nowait())
        if time.monotonic() > self._message_until:
            self._message = Span("")
        self._read_log()
        now = time.time()
        drawn = _Drawn(self._feed.version, self._view, self._message, int(now), screen.size, self._log)
        if drawn == self._drawn:
            return
        snapshot = self._feed.snapshot()
        self._rows = in_order(rows_of(snapshot.status, now), self._view.sort, self._view.is_reversed)
        shown = Shown(snapshot, self._view, self._rows, now, os.uname().nodename, self._message, self._log)
        screen.show(frame(shown, *drawn.size))
        self._drawn = drawn

    def _read_log(self) -> None:
        """The end of the log that is shown. What somebody has scrolled back to stays where it is."""
        if self._view.page is not Page.LOGS:
            self._log, self._log_version = (), ("", 0, 0)
        elif not self._view.back:
            status = self._feed.snapshot().status
            process = status.process(self._view.chosen)
            here = next((node.name for node in status.nodes if node.asked), "")
            if process is not None and process.node != here:
                told = (
                    f"this log is on node {process.node}; read it with: pdctl logs {process.name} -s {status.service}"
                )
                self._log, self._log_version = (clean(told),), ("", 0, 0)
                return
            path = Path(process.log) if process is not None else None
            if (version := _version_of(path)) != self._log_version:
                self._log = tuple(map(clean, tail(path, MOST_LINES, _LOG_BYTES))) if path is not None else ()
                self._log_version = version


def _version_of(path: Path | None) -> tuple[str, int, int]:
    """Changes when a log is written to, or is another one."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        found = None
    return (str(path), found.st_ino, found.st_size) if found is not None else (str(path), 0, 0)
