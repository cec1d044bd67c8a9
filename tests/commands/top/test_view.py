from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdctl.commands.top.table import SORTS, rows_of
from pdctl.commands.top.view import Action, Page, View, place_of, pressed
from tests.commands.top.made import NOW, attached, service

ROWS = rows_of(service(2, 2, attached=(attached("far"),)), NOW)
NAMES = ["prefill-0", "prefill-1", "decode-0", "decode-1", "proxy", "far"]
KEYS = ["up", "down", "j", "k", "home", "end", "page-up", "page-down", "enter", "l", "r", "y", "d", "n", "s", "S", "o",
        "?", "h", "escape", "q", "x", " ", "b", "g", "G", "left", "right", "tab", "ctrl-l"]  # fmt: skip


def after(keys: str, view: View | None = None) -> tuple[View, list[Action]]:
    view, actions = view or View(), []
    for key in keys.split():
        view, action = pressed(view, key, ROWS, 10, 100)
        actions += [action] if action else []
    return view, actions


def test_the_cursor() -> None:
    assert [row.name for row in ROWS] == NAMES
    assert after("down down")[0].chosen == "decode-0"
    assert after("up")[0].chosen == "prefill-0", "it stops at the ends"
    assert after("end down")[0].chosen == "far"
    assert after("G g")[0].chosen == "prefill-0"
    assert place_of(View(chosen="gone"), ROWS) == 0


def test_the_cursor_follows_its_process_when_the_order_changes() -> None:
    view, _ = after("down")
    assert place_of(view, ROWS[::-1]) == 4
    assert pressed(view, "down", ROWS[::-1])[0].chosen == "prefill-0"


def test_a_restart_needs_a_confirmation() -> None:
    view, actions = after("down down r")
    assert (view.asks, actions) == ("decode-0", [])
    assert after("y", view) == (replace(view, asks=""), [Action("restart", "decode-0")])
    assert after("d", view)[1] == [Action("restart", "decode-0", drain=True)]
    for key in ("n", "enter", "escape", "r", "q", "ctrl-c", "down", " "):
        found, action = pressed(view, key, ROWS)
        assert found.asks == ""
        assert action is not None
        assert action.kind == "say", f"{key} restarts nothing and does not quit"
    assert after("y")[1] == [], "nothing was asked"


def test_the_process_that_is_asked_about_is_the_one_restarted() -> None:
    """The table is sorted anew while the question stands."""
    view, _ = after("r")
    assert pressed(view, "y", ROWS[::-1])[1] == Action("restart", "prefill-0")


def test_an_attached_engine_has_neither_log_nor_restart() -> None:
    for key in ("r", "l", "enter"):
        view, actions = after(f"end {key}")
        assert (view.page, view.asks) == (Page.BOARD, "")
        assert [action.kind for action in actions] == ["say"]


def test_logs() -> None:
    view, _ = after("down l")
    assert (view.page, view.chosen) == (Page.LOGS, "prefill-1")
    assert after("page-up up", view)[0].back == 11
    assert after("home up", view)[0].back == 100, "no further than there are lines"
    assert after("home end", view)[0].back == 0
    assert after("up down down", view)[0].back == 0
    assert after("up q", view) == (replace(view, page=Page.BOARD), []), "q closes the log only"
    assert after("r", view)[0].asks == "prefill-1"
    assert after("ctrl-c", view)[1] == [Action("quit")]


def test_help_and_quit() -> None:
    for key in ("?", "h"):
        assert after(key)[0].page is Page.HELP
        assert after(f"{key} q") == (View(), []), "any key closes the help"
    for key in ("q", "ctrl-c", "ctrl-d"):
        assert after(key)[1] == [Action("quit")]
    assert after("? ctrl-c")[1] == [Action("quit")]
    for page in Page:
        assert pressed(View(page=page), "ctrl-z", ROWS)[1] == Action("suspend")
        assert pressed(View(page=page), "ctrl-l", ROWS)[1] == Action("redraw")


def test_sorting() -> None:
    view = View()
    for wanted in (*SORTS[1:], ""):
        view, _ = pressed(view, "s", ROWS)
        assert view.sort == wanted
    assert pressed(view, "S", ROWS)[0].sort == SORTS[-1]
    turned, _ = after("s s o")
    assert turned.is_reversed
    assert not after("s", turned)[0].is_reversed, "another column begins with its own order"


def test_without_processes() -> None:
    for key in KEYS:
        view, action = pressed(View(), key, [])
        assert view.asks == ""
        assert view.page in (Page.BOARD, Page.HELP)
        assert action is None or action.kind in ("quit", "redraw")


@given(st.lists(st.sampled_from(KEYS), max_size=40))
def test_only_y_or_d_after_r_restarts(keys: list[str]) -> None:
    view, before = View(), ""
    for key in keys:
        asked = view.asks
        view, action = pressed(view, key, ROWS, 10, 100)
        if action is not None and action.kind == "restart":
            assert key in ("y", "d")
            assert before == "r"
            assert action.process == asked != "far"
        assert 0 <= view.back <= 100
        assert view.sort in SORTS
        before = key
