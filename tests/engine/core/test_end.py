"""The end of a core whose parts fail at the same time."""

from __future__ import annotations

import threading
from typing import NoReturn

import pytest

from pdctl.engine.core import main as module
from pdctl.engine.core.main import End
from pdctl.engine.core.outbox import Outbox
from pdctl.engine.ipc.messages import Broken, FromCore, StartRefused
from pdctl.engine.model.parallel import RankLost
from pdctl.wire import EXIT_CONFIG


class Told(Outbox):
    def __init__(self) -> None:
        self.words: list[FromCore] = []

    def put(self, message: FromCore) -> None:
        self.words.append(message)

    def close(self) -> None: ...


class _Left(Exception):
    pass


def leave(code: int) -> NoReturn:
    raise _Left(code)


@pytest.mark.parametrize(
    ("is_final", "word", "code"),
    [(False, Broken("rank 1 was killed"), 1), (True, StartRefused("rank 1 was killed"), EXIT_CONFIG)],
)
def test_the_end_of_a_rank_is_told_with_its_reason(is_final: bool, word: FromCore, code: int) -> None:
    told = Told()
    with pytest.raises(_Left) as left:
        End(told, leave).of_rank("rank 1 was killed", is_final)
    assert (told.words, left.value.args) == ([word], (code,))


def test_a_reason_of_a_rank_goes_before_what_the_others_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RANK_S", 0.2)
    told = Told()
    ended = threading.Event()
    end = End(told, leave)

    def step_thread() -> None:
        # It never ends: the process would have.
        end.after_ranks(RankLost("connection closed"))

    threading.Thread(target=step_thread, daemon=True).start()
    with pytest.raises(_Left):
        end.of_rank("rank 1 was killed", False)
    ended.wait(0.5)
    assert told.words == [Broken("rank 1 was killed")]


def test_ranks_that_cannot_be_reached_are_told_if_none_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RANK_S", 0.0)
    told = Told()
    with pytest.raises(_Left):
        End(told, leave).after_ranks(RankLost("a rank did not take part"))
    assert told.words == [Broken("a rank did not take part")]
