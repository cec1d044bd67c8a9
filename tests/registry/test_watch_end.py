"""A watch ends when it is told to, whatever breaks at that moment."""

from __future__ import annotations

import asyncio
from typing import Never

import httpx
import pytest

from pdctl.registry import Behind, Unavailable
from pdctl.registry.etcd.gateway import Gateway, _first_failure
from pdctl.registry.etcd.messages import Empty

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


class BreaksWhenCancelled(httpx.AsyncBaseTransport):
    """A connection that breaks while it is being cancelled tells of that alone."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure
        self.asked = asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise self.failure from None
        raise AssertionError("nothing sets that")


@pytest.mark.parametrize("failure", [httpx.ReadError("broken"), httpx.ConnectError("All connection attempts failed")])
@pytest.mark.parametrize("watches", [False, True])
async def test_a_call_that_breaks_because_it_is_cancelled_is_cancelled(failure: Exception, watches: bool) -> None:
    transport = BreaksWhenCancelled(failure)
    gateway = Gateway(["http://127.0.0.1:1"])
    await gateway.close()
    gateway._client = httpx.AsyncClient(transport=transport)
    call = gateway._read("http://x", "/v3/watch", {}, lambda answer: None) if watches else gateway.call("/y", {}, Empty)
    calling: asyncio.Task[object] = asyncio.create_task(call)
    await transport.asked.wait()
    calling.cancel()
    await asyncio.wait([calling], timeout=60)
    assert calling.cancelled()
    await gateway.close()
