"""What the user has chosen, and what each key changes in it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, NamedTuple

from pdctl.commands.top.table import SORTS, Row

# Lines of a log that are read.
MOST_LINES = 2000
_QUIT = ("q", "ctrl-c", "ctrl-d")


class Page(Enum):
    """What fills the screen."""

    BOARD = "board"
    LOGS = "logs"
    HELP = "help"


@dataclass(frozen=True, slots=True)
class View:
    """`chosen`: the process that the cursor is on, empty for the first one. `asks`: the process of which a restart
    awaits its confirmation, empty for none. `back`: lines that the log is scrolled back."""

    page: Page = Page.BOARD
    chosen: str = ""
    sort: str = ""
    is_reversed: bool = False
    asks: str = ""
    back: int = 0


class Action(NamedTuple):
    """What a key orders. `process`, `drain`: of a restart."""

    kind: Literal["quit", "suspend", "redraw", "restart", "say"]
    process: str = ""
    drain: bool = False
    text: str = ""


def place_of(view: View, rows: Sequence[Row]) -> int:
    """The place of the chosen process; the first one if it is gone."""
    return next((place for place, row in enumerate(rows) if row.name == view.chosen), 0)


def pressed(
    view: View, key: str, rows: Sequence[Row], page_size: int = 1, most_back: int = 0
) -> tuple[View, Action | None]:
    """The view after a key, and what it orders. `rows`: as they are shown; `page_size`: lines of a log on the screen;
    `most_back`: lines that a log can be scrolled back."""
    if key == "ctrl-z":
        return view, Action("suspend")
    if key == "ctrl-l":
        return view, Action("redraw")
    if view.asks:
        return _answered(view, key)
    if view.page is Page.HELP:
        return _in_help(view, key)
    if view.page is Page.LOGS:
        return _in_logs(view, key, page_size, most_back)
    return _on_board(view, key, rows)


def _answered(view: View, key: str) -> tuple[View, Action | None]:
    """Only y and d restart; every other key is a no, ctrl-c also."""
    after = replace(view, asks="")
    if key in ("y", "d"):
        return after, Action("restart", view.asks, drain=key == "d")
    return after, Action("say", text=f"{view.asks} was not restarted")


def _in_help(view: View, key: str) -> tuple[View, Action | None]:
    if key == "ctrl-c":
        return view, Action("quit")
    return replace(view, page=Page.BOARD), None


def _in_logs(view: View, key: str, page_size: int, most_back: int) -> tuple[View, Action | None]:
    if key == "ctrl-c":
        return view, Action("quit")
    if key in ("q", "escape", "l", "enter", "left"):
        return replace(view, page=Page.BOARD, back=0), None
    if key in ("?", "h"):
        return replace(view, page=Page.HELP, back=0), None
    if key == "r":
        return replace(view, asks=view.chosen), None
    steps = {"up": 1, "k": 1, "down": -1, "j": -1, "page-up": page_size, "b": page_size, "page-down": -page_size,
             " ": -page_size, "home": most_back, "g": most_back, "end": -view.back, "G": -view.back}  # fmt: skip
    return replace(view, back=min(most_back, max(0, view.back + steps.get(key, 0)))), None


def _on_board(view: View, key: str, rows: Sequence[Row]) -> tuple[View, Action | None]:
    if key in _QUIT:
        return view, Action("quit")
    if key in ("?", "h"):
        return replace(view, page=Page.HELP), None
    if key in ("s", ">", "S", "<"):
        step = 1 if key in ("s", ">") else -1
        return replace(view, sort=SORTS[(SORTS.index(view.sort) + step) % len(SORTS)], is_reversed=False), None
    if key == "o":
        return replace(view, is_reversed=not view.is_reversed), None
    if key in ("l", "enter", "right", "r"):
        return _of_process(view, key, rows)
    return _moved(view, key, rows), None


def _of_process(view: View, key: str, rows: Sequence[Row]) -> tuple[View, Action | None]:
    """Logs or a restart, of the process under the cursor."""
    if not rows:
        return view, None
    row = rows[place_of(view, rows)]
    if not row.is_process:
        what = "is not started by pdctl: its log and its restart are not in pdctl's hands"
        return view, Action("say", text=f"{row.name} {what}")
    view = replace(view, chosen=row.name)
    return (replace(view, asks=row.name) if key == "r" else replace(view, page=Page.LOGS, back=0)), None


def _moved(view: View, key: str, rows: Sequence[Row]) -> View:
    steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page-up": -10, "page-down": 10, "home": -len(rows), "g": -len(rows),
             "end": len(rows), "G": len(rows)}  # fmt: skip
    if not rows or key not in steps:
        return view
    place = min(len(rows) - 1, max(0, place_of(view, rows) + steps[key]))
    return replace(view, chosen=rows[place].name)
