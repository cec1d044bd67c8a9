"""The page is opened, closed and moved; who asks is told why not."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from pdctl.control_api import DashboardOrder
from pdctl.supervisor.dashboard.dashboard import Dashboard
from pdctl.supervisor.dashboard.rates import Look
from tests.service import free_port
from tests.supervisor.dashboard.loop import in_loop
from tests.supervisor.dashboard.stage import Stage


class Configured(Stage):
    """Its topology says where the page is."""

    def listen(self, address: str) -> None:
        self.plan = SimpleNamespace(source="", node="", dashboard=SimpleNamespace(listen=address))


@pytest.fixture
def stage(tmp_path: Path) -> Configured:
    found = Configured(tmp_path)
    found.listen("")
    return found


@asynccontextmanager
async def running(stage: Configured) -> AsyncIterator[Dashboard]:
    found = Dashboard(stage, "secret")
    found.follow()
    async with asyncio.timeout(300), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(found.run_forever())
        yield found
        task.cancel()


async def answers(url: str) -> bool:
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            return (await client.get(url)).status_code == 200
        except httpx.TransportError:
            return False


async def until(url: str, wanted: bool) -> None:
    async with asyncio.timeout(120):
        while await answers(url) is not wanted:
            await asyncio.sleep(0.01)


@in_loop
async def test_it_is_off_until_somebody_asks(stage: Configured) -> None:
    async with running(stage) as page:
        assert page.order(DashboardOrder(stop=True)).url == ""
        reply = page.order(DashboardOrder())
        assert reply.ok
        await until(reply.url, True)
        assert page.order(DashboardOrder()).url == reply.url
        writes = page.order(DashboardOrder(write=True)).url
        assert writes.partition("#")[0] == reply.url.partition("#")[0]
        assert writes != reply.url
        page.order(DashboardOrder(stop=True))
        await until(reply.url, False)
        again = page.order(DashboardOrder())
        await until(again.url, True)
    assert not await answers(again.url)


@in_loop
async def test_it_follows_the_topology(stage: Configured) -> None:
    first, second = free_port(), free_port()
    stage.listen(f"127.0.0.1:{first}")
    async with running(stage) as page:
        await until(f"http://127.0.0.1:{first}/", True)
        stage.listen(f"localhost:{second}")
        page.follow()
        await until(f"http://127.0.0.1:{second}/", True)
        await until(f"http://127.0.0.1:{first}/", False)
        assert page.order(DashboardOrder()).url.startswith(f"http://localhost:{second}/#")
        reply = page.order(DashboardOrder(listen=f"127.0.0.1:{first}"))
        assert not reply.ok
        assert "pdctl dash --stop" in reply.reason
        stage.listen("")
        page.follow()
        await until(f"http://127.0.0.1:{second}/", False)
    said = (stage.journal.folder / "events.jsonl").read_text()
    # The link's token is not in a file that is shown.
    assert f"http://127.0.0.1:{first}/; open it with: pdctl dash" in said


@in_loop
async def test_a_page_that_fails_is_closed_and_the_service_goes_on(
    stage: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look() -> Look:
        raise OSError(errno.EMFILE, "Too many open files")

    async with running(stage) as page:
        with monkeypatch.context() as broken:
            broken.setattr(stage, "look", look)
            url = page.order(DashboardOrder()).url
            while "the live page is closed" not in (stage.journal.folder / "events.jsonl").read_text():
                await asyncio.sleep(0.01)
        assert not await answers(url)
        await until(page.order(DashboardOrder()).url, True)


@in_loop
async def test_a_port_that_is_taken(stage: Configured) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        stage.listen(address)
        async with running(stage) as page:
            assert "cannot be used" in page.order(DashboardOrder(listen=address)).reason
            assert "no live page" in (stage.journal.folder / "events.jsonl").read_text()
            # Without an address, the configured one counts.
            assert address in page.order(DashboardOrder()).reason


@in_loop
async def test_the_next_port_is_taken_if_the_first_is_not_free(stage: Configured) -> None:
    async with running(stage) as page, running(stage) as another:
        first, second = (one.order(DashboardOrder()).url.partition("#")[0] for one in (page, another))
        assert first != second
        await until(first, True)
        await until(second, True)
