"""What `pdctl doctor` asks of the nodes of a cluster, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from pdctl.control_api.examination_messages import (
    ExamineOrder,
    NodeFinding,
    NodeReport,
    NodeTraits,
    ReadOrder,
    ServeOrder,
    TransferOrder,
    TransferResult,
)
from pdctl.errors import PdctlError
from pdctl.net.http_client import ConnectionPool, header_lines
from pdctl.supervisor.surface.cluster import examine
from pdctl.supervisor.surface.cluster.agents import Agents
from pdctl.supervisor.surface.cluster.examine import Examinations
from tests.news import News
from tests.supervisor.surface.cluster.nodes import SECRET, Cluster, Part, cluster, start_agent

pytestmark = pytest.mark.anyio
ORDER = ExamineOrder(text="a topology", source="/x")


class Examiner(News):
    """A node that finds its own name, and that serves and reads bytes as one says."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self.node = node
        self.refuses = ""
        self.serves = 0
        self.orders: list[object] = []

    async def report(self, order: ExamineOrder) -> NodeReport:
        self.orders.append(order)
        if self.refuses:
            raise PdctlError(self.refuses)
        finding = NodeFinding(id="x.y", severity="ok", subject=self.node, observed=order.text)
        return NodeReport(findings=(finding,), traits=NodeTraits(pdctl="1", kernel="6"))

    @asynccontextmanager
    async def serving(self, order: ServeOrder) -> AsyncIterator[str]:
        self.orders.append(order)
        if self.refuses:
            raise PdctlError(self.refuses)
        self.serves += 1
        try:
            yield f"{self.node}:{order.transport}"
        finally:
            self.serves -= 1
            self.tell()

    async def read(self, order: ReadOrder) -> TransferResult:
        self.orders.append(order)
        return TransferResult(transport=order.transport, protocol="tcp", bytes_right=True, mib=order.mib, gbps=1.5)


class Rig:
    def __init__(self, found: Cluster) -> None:
        self.cluster = found
        self.nodes = {node: Examiner(node) for node in found.parts}
        self.asked = Examinations(self.nodes["a"], "a", found.control.agents)

    async def start(self) -> None:
        """Serve the other nodes' agents, with their calls."""
        for node, examiner in self.nodes.items():
            if node != "a":
                self.cluster.more[node] = Examinations(examiner, node, self.cluster.control.agents).node_routes()
                await self.cluster.end(node)
                await start_agent(self.cluster, self.cluster.parts[node])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "_HEARTBEAT_S", 0.02)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Part, ...]:
    return tuple(Part(tmp_path, node, f"127.0.0.{number}") for number, node in enumerate("abc", 2))


@asynccontextmanager
async def rig(parts: tuple[Part, ...]) -> AsyncIterator[Rig]:
    async with cluster(*parts) as found:
        made = Rig(found)
        await made.start()
        yield made


async def test_every_node_reports(parts: tuple[Part, ...]) -> None:
    async with rig(parts) as found:
        examined = await found.asked.examine(ORDER)
        assert [one.node for one in examined.nodes] == ["a", "b", "c"]
        for one in examined.nodes:
            assert one.report is not None
            assert (one.report.findings[0].subject, one.report.findings[0].observed) == (one.node, "a topology")
        assert examined.nodes[0].clock_s is None
        assert examined.nodes[1].clock_s == pytest.approx(0.0, abs=0.5)
        assert found.nodes["b"].orders == [ORDER]


async def test_a_report_may_take_longer_than_a_status(
    parts: tuple[Part, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Agents.all, "__defaults__", (False, 0.0))
    async with rig(parts[:2]) as found:
        assert [one.reason for one in (await found.asked.examine(ORDER)).nodes] == ["", ""]


async def test_a_node_that_does_not_answer_or_refuses_says_why(parts: tuple[Part, ...]) -> None:
    async with rig(parts) as found:
        found.nodes["b"].refuses = "the topology names programs"
        found.nodes["a"].refuses = "no room"
        await found.cluster.end("c")
        a, b, c = (await found.asked.examine(ORDER)).nodes
        assert (a.report, a.reason) == (None, "no room")
        assert (b.report, b.reason) == (None, "node b: the topology names programs")
        assert c.report is None
        assert "cannot be reached" in c.reason
        await start_agent(found.cluster, found.cluster.parts["c"])


async def test_a_clock_that_is_ahead_is_told(parts: tuple[Part, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    class Ahead:
        monotonic = staticmethod(time.monotonic)
        # The asked node looks before it asks, and the other one when it is asked.
        times: Iterator[float] = iter([100.0, 107.5] * 10)

        @classmethod
        def time(cls) -> float:
            return next(cls.times)

    async with rig(parts[:2]) as found:
        monkeypatch.setattr(examine, "time", Ahead)
        node = (await found.asked.examine(ORDER)).nodes[1]
        assert node.clock_s == pytest.approx(7.5, abs=0.5)
        assert 0 < node.clock_error_s < 0.5


@pytest.mark.parametrize(("serving", "reading"), [("a", "b"), ("b", "a"), ("b", "c")])
async def test_one_node_reads_from_another(parts: tuple[Part, ...], serving: str, reading: str) -> None:
    async with rig(parts) as found:
        order = TransferOrder(serving=serving, reading=reading, transport="nixl", protocol="tcp", mib=8)
        result = await found.asked.transfer(order)
        assert (result.gbps, result.mib) == (1.5, 8)
        server, reader = found.nodes[serving], found.nodes[reading]
        assert server.orders == [ServeOrder(transport="nixl", protocol="tcp", mib=8)]
        assert reader.orders == [ReadOrder(transport="nixl", protocol="tcp", mib=8, address=f"{serving}:nixl")]
        await server.until(lambda: not server.serves)


async def test_transfers_that_cannot_be_made(parts: tuple[Part, ...]) -> None:
    async with rig(parts) as found:
        with pytest.raises(PdctlError, match="no node 'z'") as unknown:
            await found.asked.transfer(TransferOrder(serving="a", reading="z", transport="nixl"))
        assert unknown.value.hint == "nodes: a, b, c"
        with pytest.raises(PdctlError, match="two nodes"):
            await found.asked.transfer(TransferOrder(serving="a", reading="a", transport="nixl"))
        found.nodes["b"].refuses = "no memory"
        with pytest.raises(PdctlError, match="node b: no memory"):
            await found.asked.transfer(TransferOrder(serving="b", reading="c", transport="nixl"))
        await found.cluster.end("c")
        with pytest.raises(PdctlError, match="does not answer"):
            await found.asked.transfer(TransferOrder(serving="c", reading="a", transport="nixl"))
        await start_agent(found.cluster, found.cluster.parts["c"])
        assert not found.nodes["a"].serves


async def test_nothing_is_served_any_more_when_the_caller_is_gone(parts: tuple[Part, ...]) -> None:
    async with rig(parts) as found:
        server = found.nodes["b"]
        agent = found.cluster.control.agents.clients()["b"]
        exchange = await agent.stream("/v1/cluster/transfer?transport=nixl&protocol=tcp&mib=1")
        assert await exchange.read()
        assert server.serves == 1
        exchange.close()
        await server.until(lambda: not server.serves)


@pytest.mark.parametrize(
    "query",
    ["", "transport=shm", "transport=nixl&mib=0", "transport=nixl&mib=99999", "transport=nixl&protocol=--serve"],
)
async def test_only_known_words_are_taken(parts: tuple[Part, ...], query: str) -> None:
    async with rig(parts) as found:
        agent = found.cluster.parts["b"].agent
        pool = ConnectionPool(agent.host, agent.port)
        headers = header_lines({"authorization": f"Bearer {SECRET}"})
        try:
            asked = await pool.request("GET", f"/v1/cluster/transfer?{query}", headers)
            wrong = await pool.request("POST", "/v1/cluster/transfer", headers, b'{"transport":"nixl"}')
            stranger = await pool.request("POST", "/v1/cluster/doctor", b"", msgspec.json.encode(ORDER))
        finally:
            pool.close()
        assert (asked.status, wrong.status, stranger.status) == (409, 409, 403)
        assert not found.nodes["b"].orders


async def test_the_user_s_calls_are_on_the_control_socket_of_a_cluster_only(parts: tuple[Part, ...]) -> None:
    async with rig(parts) as found:
        assert found.cluster.control.more == ()
        found.cluster.control.more = found.asked.routes()
        assert [route.path for route in found.cluster.control.more] == ["/v1/doctor", "/v1/doctor/transfer"]
        await asyncio.sleep(0)
