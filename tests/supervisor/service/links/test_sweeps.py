"""A sweep frees everything at an engine: it must never run while a request may need something there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from pdctl.adapters.lmdeploy.control import CONTROL, LmdeployControl
from pdctl.net.http_client import Unreachable
from pdctl.plan import Plan
from pdctl.proxy_wire import EngineLoad
from pdctl.supervisor.service.kv import KvWatch, Member
from pdctl.supervisor.service.links import sweeps
from pdctl.supervisor.service.links.sweeps import Sweeper
from pdctl.supervisor.service.proxies import Proxies

MUCH = EngineLoad(0, True, 500, 0.5, 40)
BUSY = EngineLoad(1, True, 500, 0.5, 40)
LITTLE = EngineLoad(0, True, 10, 0.01, 40)


class Said:
    """Proxies that say this of the engine in turn, then the last again. `told`: the paused engines at each update."""

    def __init__(self, *loads: list[EngineLoad]) -> None:
        self.loads = list(loads)
        self.paused: set[str] = set()
        self.swept: dict[str, int] = {}
        self.told: list[set[str]] = []
        self.reason = ""

    async def tell(self, _: object) -> str:
        self.told.append(set(self.paused))
        return self.reason

    async def loads_at(self, _: str) -> list[EngineLoad]:
        return self.loads.pop(0) if len(self.loads) > 1 else self.loads[0]


class Rig:
    """A sweeper over `proxies` with one engine. `calls`: what each sweep got; `fails`: sweeps fail."""

    def __init__(self, patch: pytest.MonkeyPatch, proxies: Said, workers: int = 1) -> None:
        self.calls: list[tuple[int, int]] = []
        self.fails = False
        self.said: list[str] = []
        self.proxies = proxies
        self.epoch = "e1"

        async def sweep(_: LmdeployControl, engine: object, swept: int, sent: int, timeout_s: float) -> int:
            if self.fails:
                raise Unreachable("gone")
            assert proxies.paused == {"p0"}, "it gets no requests meanwhile"
            self.calls.append((swept, sent))
            return sent + 100

        patch.setattr(type(CONTROL), "sweep", sweep)
        plan = SimpleNamespace(processes=[SimpleNamespace(is_proxy=True)] * workers)
        kv = SimpleNamespace(target=lambda member: None)
        self.sweeper = Sweeper(
            cast(KvWatch, kv), cast(Proxies, proxies), list, lambda: cast(Plan, plan),
            lambda name, message: self.said.append(message),
        )  # fmt: skip

    def look(self) -> None:
        asyncio.run(self.sweeper.look(Member("p0", "lmdeploy", "prefill", "h", 1, self.epoch)))


def test_an_engine_with_much_left_is_swept_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, Said([MUCH]))
    rig.look()
    assert rig.calls == [(0, 40)]
    assert rig.proxies.swept == {"p0": 1}
    assert rig.proxies.told == [{"p0"}, set()]


def test_a_sweep_waits_for_running_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, Said([MUCH], [BUSY], [BUSY], [MUCH]))
    rig.look()
    assert len(rig.calls) == 1
    assert len(rig.proxies.loads) == 1, "it looked until there was none"


def test_requests_that_do_not_end_are_not_swept_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_QUIET_S", 0.2)
    rig = Rig(monkeypatch, Said([BUSY]))
    rig.look()
    assert rig.calls == []
    assert rig.proxies.told[-1] == set(), "the engine gets requests again"
    assert "did not end" in rig.said[0]
    rig.look()
    assert len(rig.said) == 1, "not at once again"


def test_a_proxy_that_does_not_answer_may_have_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, Said([MUCH]), workers=2)
    rig.look()
    monkeypatch.setattr(sweeps, "_QUIET_S", 0.2)
    rig = Rig(monkeypatch, Said([MUCH, MUCH], [MUCH]), workers=2)
    rig.look()
    assert rig.calls == []


def test_a_proxy_that_was_not_told_may_send_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, Said([MUCH]))
    rig.proxies.reason = "proxy: gone"
    rig.look()
    assert rig.calls == []
    assert rig.proxies.swept == {}


def test_a_failed_sweep_frees_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, Said([MUCH]))
    rig.fails = True
    rig.look()
    assert rig.proxies.swept == {}
    assert rig.said == ["cannot free the KV that requests have left: gone"]


def test_little_is_swept_only_after_a_while_without_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, Said([LITTLE]))
    rig.look()
    assert rig.calls == []
    monkeypatch.setattr(sweeps, "_IDLE_S", 0.0)
    rig.look()
    assert len(rig.calls) == 1


def test_a_restarted_engine_is_counted_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, Said([MUCH]))
    rig.look()
    rig.look()
    rig.epoch = "e2"
    rig.look()
    assert rig.calls == [(0, 40), (140, 40), (0, 0)], "what was sent before is no number of the new one"
