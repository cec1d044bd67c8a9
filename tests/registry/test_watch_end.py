"""A watch ends when it is told to, whatever breaks at that moment."""

from __future__ import annotations

import asyncio
from typing import Never

import pytest

from pdctl.registry import Behind, Unavailable
from pdctl.registry.etcd.gateway import _first_failure

pytestmark = pytest.mark.anyio


async def breaks_when_cancelled() -> Never:
    """As a connection of httpx does."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise Unavailable("the connection broke") from None
    raise AssertionError("nothing sets that")


async def fails() -> Never:
    await asyncio.sleep(0)
    raise Behind("forgotten")


async def test_a_watch_that_breaks_because_it_is_cancelled_is_cancelled() -> None:
    watching = asyncio.create_task(_first_failure(breaks_when_cancelled(), breaks_when_cancelled()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    watching.cancel()
    await asyncio.wait([watching], timeout=60)
    assert watching.cancelled()


async def test_the_first_failure_is_told_and_ends_the_rest() -> None:
    assert isinstance(await _first_failure(breaks_when_cancelled(), fails()), Behind)
