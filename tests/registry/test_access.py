"""A real etcd with its own access control: calls and watches sign in, also when etcd has forgotten them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdctl.registry import Change, Put, Refused
from pdctl.registry.etcd.gateway import Credentials, Gateway
from pdctl.registry.etcd.registry import EtcdRegistry
from tests.registry import etcd

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.e2e,
    pytest.mark.skipif(etcd.BINARY is None, reason="NOT TESTED: etcd is not installed"),
]
ROOT = Credentials("root", "right")


@pytest.fixture
def member(tmp_path: Path) -> Iterator[etcd.Member]:
    with etcd.members(tmp_path, 1) as [member]:
        member.post("/v3/auth/user/add", {"name": ROOT.user, "password": ROOT.password})
        member.post("/v3/auth/role/add", {"name": "root"})
        member.post("/v3/auth/user/grant", {"user": "root", "role": "root"})
        member.post("/v3/auth/enable", {})
        yield member


def registry_of(member: etcd.Member, credentials: Credentials | None) -> EtcdRegistry:
    return EtcdRegistry(Gateway([member.url], credentials=credentials))


async def test_a_user_writes_and_watches(member: etcd.Member) -> None:
    registry, told = registry_of(member, ROOT), asyncio.Event()

    def tell(changes: tuple[Change, ...]) -> None:
        told.set()

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(registry_of(member, ROOT).watch("/a", 1, tell))
        lease = await registry.grant(60)
        await registry.write([Put("/a", b"1", lease)])
        await registry.keep(lease)
        await told.wait()
        watch.cancel()
    assert [entry.value for entry in (await registry.list("/a")).entries] == [b"1"]
    await registry.close()


async def test_a_restart_of_etcd_forgets_tokens_and_nobody_notices(member: etcd.Member) -> None:
    registry = registry_of(member, ROOT)
    await registry.write([Put("/a", b"1")])
    member.kill()
    member.start()
    etcd.until_ready(member.url)
    assert [entry.value for entry in (await registry.list("/a")).entries] == [b"1"]
    await registry.close()


@pytest.mark.parametrize("credentials", [None, Credentials("root", "wrong"), Credentials("nobody", "right")])
async def test_others_are_refused_with_a_hint(member: etcd.Member, credentials: Credentials | None) -> None:
    registry = registry_of(member, credentials)
    async with asyncio.timeout(60):
        with pytest.raises(Refused) as refused:
            await registry.list("/a")
        assert refused.value.hint
        with pytest.raises(Refused):
            await registry.write([Put("/a", b"1")])
        with pytest.raises(Refused):
            await registry.watch("/a", 1, lambda changes: None)
    await registry.close()
