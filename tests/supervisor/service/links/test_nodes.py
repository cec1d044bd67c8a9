"""Engines that register themselves: who becomes a member, how long one stays, and what the proxies are told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from pdctl.control_api import Node
from pdctl.plan import Attached, Plan
from pdctl.proxy_wire import EngineLoad, ProxyConfig
from pdctl.supervisor.rundir.journal import EVENTS, Journal, read_entries
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.service.links import nodes as module
from pdctl.supervisor.service.links.nodes import RegisteredEngines
from pdctl.supervisor.service.proxies import Proxies
from tests.supervisor.fleet import child, plan_of

DECODE = Node(kind="lmdeploy", role="decode", host="10.0.0.7", port=23333, models=("m", "lora"), speed=3)
NAME = "10.0.0.7:23333"


class Busy(Proxies):
    """Proxies that say that these calls run."""

    def __init__(self, folder: RunDir) -> None:
        super().__init__(folder, "s", list)
        self.calls = 0
        self.asked = asyncio.Event()

    async def loads(self) -> dict[str, list[EngineLoad]]:
        self.asked.set()
        return {NAME: [EngineLoad(self.calls, True, latency=(0.5, 0.25)), EngineLoad(1, True)]} if self.calls else {}


class Rig:
    """Members of a service whose topology accepts them. `answering`: who answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "r").mkdir(exist_ok=True)
        self.run_dir = RunDir(folder / "r")
        plan = plan_of(folder)
        proxy = replace(plan.proxy, accept_nodes=True, node_keys="k", node_away_s=10.0)
        supervision = replace(plan.supervision, drain_s=60.0)
        self.plan: Plan = replace(plan, served_model_name="m", proxy=proxy, supervision=supervision)
        self.proxies = Busy(self.run_dir)
        self.answering: set[str] = set()
        self.tidied = 0
        self.told: list[ProxyConfig] = []
        self.registered = RegisteredEngines(
            plan=lambda: self.plan, proxies=self.proxies, state_of=self._state, answering=lambda: self.answering,
            tell=self._tell, tidy=self._tidy, journal=Journal(folder / "logs", lambda name, message: None),
            run_dir=self.run_dir,
        )  # fmt: skip
        self.proxies.registered = self.registered.attached

    async def _state(self, name: str) -> str:
        return f"{name} is not running"

    async def _tell(self) -> None:
        self.told.append(self.proxies._config(self.plan))

    def _tidy(self) -> None:
        self.tidied += 1

    def events(self) -> list[tuple[object, object]]:
        return [(entry["process"], entry["event"]) for entry in read_entries(self.folder / "logs", EVENTS)]

    def names(self) -> list[str]:
        return [one.name for one in self.registered.attached()]

    def running(self, act: Callable[[], Awaitable[None]]) -> None:
        """Run `act` while the members are watched."""

        async def run() -> None:
            self.proxies.asked = asyncio.Event()
            async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self.registered.keep_forever())
                await act()
                watch.cancel()

        asyncio.run(run())

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(module, "_LOOK_S", 0.02)
    return Rig(tmp_path)


def test_a_registration_makes_an_attached_engine(rig: Rig) -> None:
    assert rig.registered.add(DECODE) == ""
    assert rig.registered.attached() == (
        Attached(NAME, "decode", "lmdeploy", "10.0.0.7", 23333, "", {}, "DLSlime"),
    )  # fmt: skip
    assert [address.name for address in rig.proxies._config(rig.plan).engines] == [NAME]
    assert rig.events() == [(NAME, "node_added")]


def test_the_same_registration_twice_changes_nothing(rig: Rig) -> None:
    assert (rig.registered.add(DECODE), rig.registered.add(DECODE)) == ("", "")
    assert rig.names() == [NAME]
    assert rig.events() == [(NAME, "node_added")]
    rig.registered.add(msgspec.structs.replace(DECODE, role="prefill"))
    assert [one.role for one in rig.registered.attached()] == ["prefill"]


def test_it_exchanges_kv_as_others_of_its_kind_do(rig: Rig) -> None:
    other = Attached("p0", "prefill", "lmdeploy", "10.0.0.8", 1, "", {}, "Mooncake")
    rig.plan = replace(rig.plan, attached=(other,))
    rig.registered.add(DECODE)
    assert rig.registered.attached()[0].connector == "Mooncake"


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (msgspec.structs.replace(DECODE, models=("other",)), "serves other, and this service m"),
        (msgspec.structs.replace(DECODE, models=()), "serves no model"),
        (msgspec.structs.replace(DECODE, kind="vllm"), "do not register themselves"),
        (msgspec.structs.replace(DECODE, kind="none"), "do not register themselves"),
        (msgspec.structs.replace(DECODE, host="10.0.0.8", port=1), "is 'p0' of the topology already"),
        (msgspec.structs.replace(DECODE, host="127.0.0.1", port=2), "is 'proxy' of the topology already"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(rig: Rig, node: Node, said: str) -> None:
    proxy = child("proxy", "x", role="proxy", ports={"http": 2})
    rig.plan = replace(
        rig.plan, processes=(proxy,), attached=(Attached("p0", "prefill", "lmdeploy", "10.0.0.8", 1, ""),)
    )
    assert said in rig.registered.add(node)
    assert rig.registered.attached() == ()
    assert rig.events() == []


def test_a_topology_that_accepts_none_accepts_none(rig: Rig) -> None:
    rig.plan = replace(rig.plan, proxy=replace(rig.plan.proxy, accept_nodes=False))
    assert "accept_nodes" in rig.registered.add(DECODE)


def test_the_number_of_members_has_a_limit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    several = [msgspec.structs.replace(DECODE, port=port) for port in (1, 2, 3)]
    assert [bool(rig.registered.add(node)) for node in several] == [False, False, True]
    assert rig.registered.add(several[0]) == "", "who is a member may say it again"
    assert len(rig.names()) == 2


def test_a_removed_engine_is_forgotten_when_its_requests_have_ended(rig: Rig) -> None:
    rig.registered.add(DECODE)
    rig.proxies.calls = 1

    async def act() -> None:
        assert rig.registered.remove(NAME) == ""
        await rig.proxies.asked.wait()
        assert rig.told[-1].draining == [NAME], "the proxies were told before it was asked"
        assert rig.names() == [NAME]
        assert (await rig.registered.nodes()).nodes == (), "LMDeploy's status shows it no more"
        rig.proxies.calls = 0
        await rig.until(lambda: not rig.names())
        await rig.until(lambda: not rig.told[-1].engines)

    rig.running(act)
    assert rig.tidied
    assert rig.told[-1].draining == []
    assert rig.events() == [(NAME, "node_added"), (NAME, "node_leaving"), (NAME, "node_removed")]
    assert "has registered itself" in rig.registered.remove(NAME)


def test_one_that_registers_again_while_it_leaves_stays(rig: Rig) -> None:
    rig.registered.add(DECODE)
    rig.proxies.calls = 1

    async def act() -> None:
        rig.registered.remove(NAME)
        await rig.proxies.asked.wait()
        rig.registered.add(DECODE)
        rig.proxies.calls = 0
        await rig.until(lambda: rig.told[-1].draining == [])
        await rig.until(lambda: not any(member.drains for member in rig.registered._members.values()))

    rig.running(act)
    assert rig.names() == [NAME]


def test_a_silent_engine_is_forgotten_after_a_time(rig: Rig) -> None:
    rig.registered.add(DECODE)
    rig.answering.add(NAME)
    rig.registered._look(100.0)
    rig.answering.clear()
    rig.registered._look(6.0)
    assert rig.names() == [NAME]
    rig.answering.add(NAME)
    rig.registered._look(6.0)
    rig.answering.clear()
    rig.registered._look(6.0)
    assert rig.names() == [NAME], "the time begins anew after each answer"
    rig.registered._look(6.0)
    assert rig.names() == []
    silent = [(NAME, "node_answers"), (NAME, "node_silent")]
    assert rig.events() == [(NAME, "node_added"), *silent, *silent, (NAME, "node_lost")]


def test_the_status_has_load_and_latency_of_all_proxies(rig: Rig) -> None:
    rig.registered.add(DECODE)
    rig.proxies.calls = 2
    [found] = asyncio.run(rig.registered.nodes()).nodes
    assert (found.url, found.role, found.models, found.speed) == (f"http://{NAME}", "decode", ("m", "lora"), 3)
    assert (found.unfinished, found.latency) == (3, (0.5, 0.25))


def test_a_later_supervisor_has_the_same_members(rig: Rig, tmp_path: Path) -> None:
    rig.registered.add(DECODE)
    rig.registered.add(msgspec.structs.replace(DECODE, port=1))
    rig.registered.remove("10.0.0.7:1")
    later = Rig(tmp_path)
    later.registered.load()
    assert later.names() == [NAME]


def test_a_changed_topology_ends_memberships_that_do_not_fit_it(rig: Rig) -> None:
    rig.registered.add(DECODE)
    rig.registered.add(msgspec.structs.replace(DECODE, port=1))
    rig.plan = replace(rig.plan, attached=(Attached("d0", "decode", "lmdeploy", "10.0.0.7", 1, ""),))
    assert rig.names() == [NAME], "the proxies never have two of one address"

    async def act() -> None:
        await rig.until(lambda: "10.0.0.7:1" not in rig.registered._members)
        rig.plan = replace(rig.plan, served_model_name="another")
        await rig.until(lambda: not rig.registered._members)

    rig.running(act)


def test_names_never_clash_with_those_of_a_topology() -> None:
    import re

    from pdctl.names.services import NAME

    for host in ("10.0.0.7", "prefill-0", "fd00::7"):
        assert not re.fullmatch(NAME, msgspec.structs.replace(DECODE, host=host).name)
    assert msgspec.structs.replace(DECODE, host="fd00::7").url == "http://[fd00::7]:23333"
