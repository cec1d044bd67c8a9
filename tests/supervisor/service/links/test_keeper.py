"""Links that the supervisor keeps: made once per start of both engines, in bounded number, and told to the proxies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pdctl.adapters import Peer, Target
from pdctl.adapters.lmdeploy.control import LmdeployControl
from pdctl.plan import Attached
from pdctl.proxy_wire import EngineAddress
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.service.kv import KvWatch, Member
from pdctl.supervisor.service.links import keeper
from pdctl.supervisor.service.links.attached import AttachedEngines
from pdctl.supervisor.service.links.keeper import LinkKeeper
from pdctl.wire import LinkInfo
from tests.adapters.lmdeploy.messages import Scripted


@dataclass
class Rig:
    """A keeper over scripted engines: p0 and d0. `told`: how often the proxies were told."""

    keeper: LinkKeeper
    engines: dict[str, Scripted]
    members: list[Member]
    plan: list[Attached]
    said: list[tuple[str, str]] = field(default_factory=list)
    told: int = 0

    def made(self) -> int:
        return self.engines["d0"].paths().count("p2p_connect")

    def unlinked(self) -> dict[str, list[str]]:
        pairs = [EngineAddress(n, r, "lmdeploy", "h", 1) for n, r in (("p0", "prefill"), ("d0", "decode"))]
        return self.keeper.unlinked(pairs)


def with_engines(folder: Path, act: Callable[[Rig], Awaitable[None]], attach: bool = False) -> Rig:
    async def run() -> Rig:
        engines = {name: Scripted(metrics=b"process_start_time_seconds 1.0\n") for name in ("p0", "d0")}
        ends = {name: await asyncio.start_server(one.serve, "127.0.0.1", 0) for name, one in engines.items()}
        ports = {name: end.sockets[0].getsockname()[1] for name, end in ends.items()}
        roles = {"p0": "prefill", "d0": "decode"}
        members = [] if attach else [Member(n, "lmdeploy", roles[n], "127.0.0.1", ports[n], "e1") for n in engines]
        plan = [Attached(n, roles[n], "lmdeploy", "127.0.0.1", ports[n], "", {}) for n in engines if attach]
        said: list[tuple[str, str]] = []
        watched = AttachedEngines(lambda: plan, lambda *words: said.append(words))
        kv = KvWatch("s", lambda: members, set, lambda *words: said.append(words), watched.members)

        async def changed() -> None:
            rig.told += 1

        def names() -> set[str]:
            return {one.name for one in members} | {one.name for one in plan}

        rig = Rig(
            LinkKeeper(kv, lambda: members, watched, names, changed, RunDir(folder)), engines, members, plan, said
        )
        try:
            async with asyncio.timeout(60):
                await act(rig)
        finally:
            kv.close()
            watched.close()
            for end in ends.values():
                end.close()
        return rig

    return asyncio.run(run())


@pytest.mark.parametrize("attach", [False, True])
def test_a_pair_is_linked_once_for_each_start(tmp_path: Path, attach: bool) -> None:
    async def act(rig: Rig) -> None:
        assert rig.unlinked() == {"d0": ["p0"]}
        await rig.keeper.look()
        await rig.keeper.look()
        assert (rig.made(), rig.unlinked()) == (1, {})
        told = rig.told
        if attach:
            rig.engines["p0"].answers["metrics"] = b"process_start_time_seconds 2.0\n"
        else:
            rig.members[0] = replace(rig.members[0], epoch="e2")
            assert rig.keeper.died("p0")
            assert rig.unlinked() == {"d0": ["p0"]}
        await rig.keeper.look()
        assert (rig.made(), rig.unlinked()) == (2, {})
        assert rig.told > told
        assert "p2p_drop_connect" in rig.engines["d0"].paths(), "the old end is dropped before"

    with_engines(tmp_path, act, attach)


def test_two_that_become_ready_at_once_are_linked_by_one_call(tmp_path: Path) -> None:
    async def act(rig: Rig) -> None:
        await asyncio.gather(rig.keeper.link("p0"), rig.keeper.link("d0"), rig.keeper.look())
        assert rig.made() == 1
        assert "p2p_drop_connect" not in rig.engines["d0"].paths(), "there is nothing to drop at the first start"

    with_engines(tmp_path, act)


def test_a_failure_is_tried_again_later_and_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_FIRST_PAUSE_S", 60.0)

    async def act(rig: Rig) -> None:
        rig.engines["d0"].answers["p2p_connect"] = 500
        for _ in range(5):
            await rig.keeper.look()
        assert rig.made() == 1, "not at once again"
        assert rig.unlinked() == {"d0": ["p0"]}
        assert [words for words in rig.said if "no link" in words[1]] == rig.said
        rig.keeper._tries["d0", "p0"].due = 0.0
        rig.engines["d0"].answers["p2p_connect"] = {"status": 1}
        await rig.keeper.look()
        assert rig.unlinked() == {}

    with_engines(tmp_path, act)


def test_a_removed_engine_is_unlinked(tmp_path: Path) -> None:
    async def act(rig: Rig) -> None:
        await rig.keeper.look()
        del rig.plan[0]
        await rig.keeper.look()
        assert rig.engines["p0"].paths()[-1] == rig.engines["d0"].paths()[-1] == "p2p_drop_connect"
        assert not rig.keeper.kv.links

    with_engines(tmp_path, act, attach=True)


def test_an_engine_that_is_removed_while_it_is_linked_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(rig: Rig) -> None:
        link = LmdeployControl.link

        async def linked(self: LmdeployControl, reader: Target, peers: list[Peer], timeout_s: float) -> list[LinkInfo]:
            found = await link(self, reader, peers, timeout_s)
            del rig.plan[0]
            return found

        monkeypatch.setattr(LmdeployControl, "link", linked)
        await rig.keeper.look()
        assert rig.made() == 1
        assert rig.engines["p0"].paths()[-1] == rig.engines["d0"].paths()[-1] == "p2p_drop_connect"
        assert not rig.keeper.kv.links
        assert not rig.keeper.joined
        await rig.keeper.look()
        assert rig.made() == 1

    with_engines(tmp_path, act, attach=True)


def test_a_later_supervisor_takes_the_links_over(tmp_path: Path) -> None:
    async def act(rig: Rig) -> None:
        await rig.keeper.look()
        rig.keeper.joined.clear()
        rig.keeper.load()
        await rig.keeper.look()
        assert rig.made() == 1
        (tmp_path / keeper.LINKS).write_text("?")
        rig.keeper.load()
        assert rig.unlinked() == {}

    with_engines(tmp_path, act)
