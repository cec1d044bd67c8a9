"""One scrape of a service, over real sockets: engines that answer, are slow, hang, are gone, or have no metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdctl.control_api import Link as LinkStatus
from pdctl.control_api import ProcessStatus, ServiceStatus
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.telemetry import scrape as scraping
from pdctl.proxy.telemetry.scrape import ServiceScrape
from pdctl.proxy.telemetry.service_metrics import Status
from pdctl.proxy_wire import EngineAddress
from tests.doctor.trees import Port, Tree

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Values = dict[str, dict[tuple[tuple[str, str], ...], float]]


def http(body: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


class Answering:
    """An engine that answers with the same bytes each time."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.heads: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answer)
        await writer.drain()
        writer.close()


async def hanging(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes the request, answers a part and nothing more, until the proxy gives up."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\npdctl_engine_tokens_total 1\n")
    await reader.read()
    writer.close()


@asynccontextmanager
async def serving(talks: dict[str, Talk], gone: tuple[str, ...] = ()) -> AsyncIterator[EnginePool]:
    """A pool of these engines. `gone`: more engines, where nobody listens."""
    servers = {name: await asyncio.start_server(talk, "127.0.0.1", 0) for name, talk in talks.items()}
    ports = {name: server.sockets[0].getsockname()[1] for name, server in servers.items()}
    ports |= dict.fromkeys(gone, 1)
    pool = EnginePool.of(
        [EngineAddress(name, "decode", "builtin", "127.0.0.1", port) for name, port in ports.items()], "hush"
    )
    try:
        yield pool
    finally:
        pool.close()
        for server in servers.values():
            server.close()
            await server.wait_closed()


def values(text: bytes) -> Values:
    found: Values = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def good(found: Values) -> dict[str, float]:
    return {dict(labels)["source"]: value for labels, value in found["pdctl_scrape_ok"].items()}


def test_a_source_that_fails_takes_nothing_else_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "SOURCE_S", 0.3)
    fine = Answering(http("# TYPE pdctl_engine_tokens_total counter\npdctl_engine_tokens_total 7\n"))
    refusing, bare = Answering(http("no", "500 No")), Answering(http("", "404 Not Found"))

    async def run() -> Values:
        talks: dict[str, Talk] = {"fine": fine, "hangs": hanging, "refuses": refusing, "bare": bare}
        async with serving(talks, gone=("gone",)) as pool:
            return values(await ServiceScrape(pool, tmp_path / "none", tmp_path).text())

    found = asyncio.run(run())
    assert found["pdctl_engine_tokens_total"] == {(("engine", "fine"),): 7.0}, "no part of an unfinished answer"
    expected = {"fine": 1.0, "hangs": 0.0, "refuses": 0.0, "gone": 0.0, "supervisor": 0.0}
    assert good(found) == expected, "an engine without metrics has not failed"
    assert b"authorization: Bearer hush" in fine.heads[0]


def test_an_endless_answer_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "_MOST_BYTES", 1000)
    large = Answering(http("a 1\n" * 1000))

    async def run() -> Values:
        async with serving({"large": large}) as pool:
            return values(await ServiceScrape(pool, tmp_path / "none", tmp_path).text())

    found = asyncio.run(run())
    assert good(found)["large"] == 0.0
    assert "a" not in found


def test_many_scrapes_at_once_ask_an_engine_once(tmp_path: Path) -> None:
    fine = Answering(http("a 1\n"))

    async def run() -> set[bytes]:
        async with serving({"fine": fine}) as pool:
            scrape = ServiceScrape(pool, tmp_path / "none", tmp_path)
            return set(await asyncio.gather(*(scrape.text() for _ in range(50))))

    assert len(asyncio.run(run())) == 1
    assert len(fine.heads) == 1


def test_a_result_is_not_kept_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "_KEPT_S", -1.0)
    fine = Answering(http("a 1\n"))

    async def run() -> None:
        async with serving({"fine": fine}) as pool:
            scrape = ServiceScrape(pool, tmp_path / "none", tmp_path)
            await scrape.text()
            await scrape.text()

    asyncio.run(run())
    assert len(fine.heads) == 2


PROCESS = ProcessStatus(
    name="decode-0", kind="builtin", role="decode", group="decode", state="backoff", reason="", pid=None, restarts=3,
    last_exit=None, device="cpu", cpus=(), gpus=(), rdma=(), ports={}, ready_since=None, epoch="", adopted=False,
    log="", phase="", phase_s=None,
)  # fmt: skip
LINK = LinkStatus(
    reader="decode-0", peer="prefill-0", epoch="", transport="mooncake", protocol="tcp", reason="", fallback="no RDMA",
    error="", refused=False, pulls=2, bytes=300, gbps=1.5,
)  # fmt: skip
STATUS = ServiceStatus(
    service="t", state="degraded", failure=None, proxy_url="", model="", served_model_name="", tls_cert="",
    supervisor_pid=1, run_dir="", log_dir="", source="", trees="", apply=None, processes=(PROCESS,), attached=(),
    links=(LINK,),
)  # fmt: skip


def test_the_supervisors_status_has_every_field_that_is_read() -> None:
    assert msgspec.json.decode(msgspec.json.encode(STATUS), type=Status).processes[0].restarts == 3


def test_processes_and_links_come_from_the_supervisor(tmp_path: Path) -> None:
    body = msgspec.json.encode(STATUS).decode()

    async def run() -> Values:
        server = await asyncio.start_unix_server(Answering(http(body)), tmp_path / "control.sock")
        async with server, serving({}) as pool:
            return values(await ServiceScrape(pool, tmp_path / "control.sock", tmp_path).text())

    found, pair = asyncio.run(run()), (("decode", "decode-0"), ("prefill", "prefill-0"))
    assert good(found) == {"supervisor": 1.0}
    assert found["pdctl_service_ready"] == {(): 0.0}
    assert found["pdctl_process_restarts_total"] == {(("process", "decode-0"),): 3.0}
    assert list(found["pdctl_process_up"].values()) == [0.0]
    assert found["pdctl_process_state"] == {(("process", "decode-0"), ("state", "backoff")): 1.0}
    assert found["pdctl_link_fallback"] == {pair: 1.0}
    assert found["pdctl_link_bytes_per_second"] == {pair: 1.5e9}
    assert found["pdctl_link_bytes_total"] == {pair: 300.0}


def test_the_ports_of_rdma_devices(tmp_path: Path) -> None:
    counters = {"symbol_error": "12", "port_xmit_data": "100", "link_downed": "N/A (no PMA)"}
    tree = Tree(tmp_path)
    tree.hca("mlx5_0", {1: Port(counters=counters, hw_counters={"out_of_sequence": "4", "lifespan": "10"})})

    async def run() -> Values:
        async with serving({}) as pool:
            return values(await ServiceScrape(pool, tmp_path / "none", tmp_path).text())

    found, port = asyncio.run(run()), (("device", "mlx5_0"), ("port", "1"))
    assert good(found)["rdma"] == 1.0
    assert found["pdctl_rdma_port_active"] == {port: 1.0}
    assert found["pdctl_rdma_port_bytes_per_second"] == {port: 50e9}
    assert found["pdctl_rdma_sent_bytes_total"] == {port: 400.0}
    events = {dict(labels)["counter"]: value for labels, value in found["pdctl_rdma_events_total"].items()}
    assert (events["symbol_error"], events["out_of_sequence"]) == (12.0, 4.0)
    assert "lifespan" not in events
    assert "link_downed" not in events, "it has no value"
