"""The front door: what is asked of a launcher, how its answers are told, and what goes wrong on the way."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest

from pdctl import __version__, launchers
from pdctl.errors import PdctlError
from pdctl.launchers.__main__ import done
from pdctl.launchers.launcher import RUNNING, STARTING, WAITING, Launcher, Request, Standing, Started, Wanted
from pdctl.topology.loader import load_cluster_text
from pdctl.topology.schema import LAUNCHERS
from tests.launchers.test_reservation import TEXT

START = Request("start", "fake", "", wanted=Wanted("s", "", (), {}))


class Fake:
    """A launcher whose agents do as they are told."""

    def __init__(self, answers: Sequence[list[Standing]], is_new: bool = True) -> None:
        self._answers = [*answers]
        self._is_new = is_new
        self.given_back: list[tuple[str, bool]] = []

    def start(self, wanted: Wanted) -> Started:
        return Started(self._is_new, ("a note",))

    def agents(self, service: str) -> list[Standing]:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    def give_back(self, service: str, now: bool) -> list[str]:
        self.given_back.append((service, now))
        return ["a", "b"]


def test_a_start_waits_until_all_agents_run() -> None:
    ready = [Standing("a", RUNNING, 7, pdctl=__version__), Standing("b", RUNNING, 8, True, "", "0.0.9", ("a hint",))]
    launcher: Launcher = Fake([[], [Standing("a"), Standing("b", STARTING)], ready])
    told = done(START, launcher)
    assert told.agents == ready
    assert told.notes == [
        "a note", "node b: a hint", f"nodes with another version of pdctl than {__version__}: b (0.0.9)"
    ]  # fmt: skip


@pytest.mark.parametrize("is_new", [True, False])
def test_an_agent_that_does_not_start_gives_back_only_what_is_new(is_new: bool) -> None:
    fake = Fake([[Standing("a", RUNNING, 7), Standing("b", WAITING, reason="no secret")]], is_new)
    with pytest.raises(PdctlError, match="the agent of node b does not run: no secret"):
        done(START, fake)
    assert fake.given_back == ([("s", True)] if is_new else [])


def test_an_end_tells_where_agents_were() -> None:
    fake = Fake([[]])
    assert done(Request("give_back", "fake", "", service="s"), fake).ended == ["a", "b"]
    assert fake.given_back == [("s", False)]


def test_kinds_are_those_of_the_topology() -> None:
    assert set(LAUNCHERS) == {"none", *launchers.KINDS}


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_both_say_how_to_get_it(tmp_path: Path) -> None:
    topology = load_cluster_text(TEXT, str(tmp_path / "t.toml"))
    for verb in (launchers.start, launchers.give_back):
        with pytest.raises(PdctlError, match="launcher 'ray' cannot be used: No module named 'ray'") as failure:
            verb(topology, lambda _: None)
        assert failure.value.hint == "on every node: pip install 'pdctl[ray]'"


def test_nothing_is_asked_of_nobody(tmp_path: Path) -> None:
    alone = TEXT[: TEXT.index("[cluster]")] + TEXT[TEXT.index("[[engines") :].replace('nodes = ["a", "b"]', "")
    nobody = TEXT.replace('launcher = "ray"', "").replace('ray_token_file = "~/ray.token"', "")
    for text in (nobody, alone):
        topology = load_cluster_text(text, str(tmp_path / "t.toml"))
        said: list[str] = []
        launchers.start(topology, said.append)
        launchers.give_back(topology, said.append)
        assert said == []
