"""Writes behind a fence: none happens after a newer one, however late its member carries it out."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.registry import Delete, Listing, Put, Unavailable
from pdctl.registry.fence import Fence, NotOurs
from tests.registry.late import LateRegistry

pytestmark = pytest.mark.anyio
OWN, KEY = "/own", "/value"
STEPS = st.lists(st.sampled_from(["write", "freeze", "another answers", "thaw"]), max_size=30)


async def fenced(registry: LateRegistry) -> Fence:
    revision = await registry.write([Put(OWN, b"mine")])
    assert revision is not None
    return Fence(registry, Put(OWN, b"mine"), revision, revision)


async def value(registry: LateRegistry, key: str = KEY) -> bytes | None:
    return next((entry.value for entry in (await registry.list(key)).entries), None)


async def played(steps: list[str]) -> None:
    registry = LateRegistry()
    fence = await fenced(registry)
    answered: bytes | None = None
    for number, step in enumerate(steps):
        if step == "freeze":
            registry.is_frozen = True
        elif step == "another answers":
            registry.is_frozen = False
        elif step == "thaw":
            await registry.thaw()
        else:
            try:
                if fence.is_unsure:
                    await fence.settle(KEY)
                await fence.write([Put(KEY, str(number).encode())])
                answered = str(number).encode()
            except Unavailable:
                answered = None
        if answered is not None:
            assert await value(registry) == answered


@given(STEPS)
def test_what_was_answered_stays_until_it_is_written_over(steps: list[str]) -> None:
    asyncio.run(played(steps))


async def unsure(registry: LateRegistry) -> Fence:
    """A fence that has written "late" and got no answer."""
    fence = await fenced(registry)
    registry.is_frozen = True
    with pytest.raises(Unavailable):
        await fence.write([Put(KEY, b"late")])
    registry.is_frozen = False
    return fence


async def test_who_settles_sees_what_stays() -> None:
    registry = LateRegistry()
    fence = await unsure(registry)
    seen = (await fence.settle(KEY)).entries
    await registry.thaw()
    assert seen == ()
    assert await value(registry) is None


async def test_nothing_is_sure_before_it_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = LateRegistry()
    fence = await unsure(registry)
    look = registry.list

    async def silent(prefix: str) -> Listing:
        if prefix == KEY:
            raise Unavailable("no answer")
        return await look(prefix)

    monkeypatch.setattr(registry, "list", silent)
    with pytest.raises(Unavailable):
        await fence.settle(KEY)
    assert fence.is_unsure
    monkeypatch.undo()
    await registry.thaw()
    assert (await fence.settle(KEY)).entries == ()
    assert not fence.is_unsure


async def test_a_key_that_is_new_ends_writes() -> None:
    registry = LateRegistry()
    fence = await fenced(registry)
    await registry.write([Delete(OWN)])
    await registry.write([Put(OWN, b"another's")])
    with pytest.raises(NotOurs):
        await fence.write([Put(KEY, b"1")])
    assert await value(registry) is None


async def test_a_lost_answer_does_not_make_another_s_key_ours() -> None:
    registry = LateRegistry()
    fence = await unsure(registry)
    await registry.write([Delete(OWN)])
    with pytest.raises(NotOurs):
        await fence.settle(KEY)
    await registry.write([Put(OWN, b"another's")])
    with pytest.raises(NotOurs):
        await fence.settle(KEY)
    assert await value(registry, OWN) == b"another's"
