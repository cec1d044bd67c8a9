"""Two real engines of two nodes, with certificates: what they do for each other, and whom they refuse."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdctl.net.http_client import ConnectionPool, Unreachable, header_lines
from pdctl.net.identity import CERTIFICATES_ENV, ContextFactory, identity_in
from pdctl.wire import EPOCH_ENV, SECRET_ENV
from tests.certificates import EXPIRED, made_ca, made_node, stranger_context
from tests.service import free_port, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.anyio]
SECRET = "a secret of both engines"
A, B = "127.0.0.21", "127.0.0.22"
PROMPT = "Once upon a time there was a prompt of more than one block. " * 4


@dataclass
class Engine:
    """An engine and its process. `who`: the folder of its node."""

    name: str
    host: str
    port: int
    epoch: str
    who: Path
    process: subprocess.Popen[bytes]

    @property
    def holder(self) -> str:
        return f"{self.name}@{self.epoch}"

    @property
    def address(self) -> dict[str, Any]:
        return {"name": self.name, "host": self.host, "port": self.port, "epoch": self.epoch}

    async def call(
        self,
        path: str,
        body: object = None,
        tls: ContextFactory | None = None,
        secret: str = SECRET,
        host: str = "",
        port: int = 0,
        **headers: str,
    ) -> tuple[int, Any]:
        """Status and answer; (0, words) if there is none."""
        pool = ConnectionPool(host or self.host, port or self.port, tls=tls)
        lines = {name.replace("_", "-"): value for name, value in headers.items()}
        lines["authorization"] = f"Bearer {secret}"
        data = b"" if body is None else msgspec.json.encode(body)
        try:
            method = "GET" if body is None else "POST"
            answer = await pool.request(method, path, header_lines(lines), data, timeout_s=60)
        except Unreachable as failure:
            return 0, str(failure)
        finally:
            pool.close()
        return answer.status, msgspec.json.decode(answer.body) if answer.body else None


@dataclass
class Service:
    """`a` computes prompts, `b` continues them; `tls` of each node; `folder`: for certificates of others."""

    a: Engine
    b: Engine
    tls: dict[str, ContextFactory]
    folder: Path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("certificates")
    ca = made_ca(folder / "ca")
    engines = []
    try:
        for name, node, host in (("prefill", "a", A), ("decode", "b", B)):
            who = made_node(ca, folder / node, node, host)
            engines.append(started(name, host, f"{node}~4fa-1", who, tiny_model))
        tls = {node: identity_in(str(folder / node)).client_context for node in ("a", "b")}
        prefill, decode = engines
        made = Service(prefill, decode, tls, folder)
        for engine in engines:
            wait_until(lambda engine=engine: is_ready(made, engine), what=f"{engine.name} to be ready")
        yield made
    finally:
        for engine in engines:
            engine.process.terminate()
        for engine in engines:
            engine.process.wait(30)


def started(name: str, host: str, epoch: str, who: Path, model: Path) -> Engine:
    port, run_dir = free_port(), who / "run"
    run_dir.mkdir()
    argv = (
        sys.executable, "-m", "pdctl.engine", "serve", "--name", name, "--model", str(model), "--host", host, "--port",
        str(port), "--kv-cache-gb", "0.05", "--run-dir", str(run_dir),
    )  # fmt: skip
    env = {**os.environ, SECRET_ENV: SECRET, EPOCH_ENV: epoch, CERTIFICATES_ENV: str(who), "OMP_NUM_THREADS": "1"}
    with (who / "log").open("wb") as log:
        return Engine(name, host, port, epoch, who, subprocess.Popen(argv, env=env, stdout=log, stderr=log))


def is_ready(service: Service, engine: Engine) -> bool:
    assert engine.process.poll() is None, (engine.who / "log").read_text()[-2000:]
    return asyncio.run(engine.call("/health", tls=service.tls["a"]))[0] == 200


async def held(service: Service) -> dict[str, Any]:
    """A prompt that `a` has computed for whoever continues it: its hand-over."""
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "kv_transfer_params": {"do_remote_decode": True}}
    status, answer = await service.a.call("/v1/completions", body, service.tls["a"], x_pdctl_router="proxy@a~1-1")
    assert status == 200, answer
    return dict(answer["kv_transfer_params"])


async def test_engines_of_two_nodes_hand_over_and_free(service: Service) -> None:
    status, links = await service.b.call("/pdctl/v1/links", {"peers": [service.a.address]}, service.tls["b"])
    assert (status, links["links"][0]["error"]) == (200, "")
    alone = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    _, whole = await service.a.call("/v1/completions", alone, service.tls["a"], x_pdctl_router="proxy@a~1-1")
    given = {**alone, "kv_transfer_params": await held(service)}
    # The proxy of another node may send it.
    status, answer = await service.b.call("/v1/completions", given, service.tls["a"], x_pdctl_router="proxy@a~1-1")
    assert status == 200, answer
    assert answer["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]
    _, state = await service.b.call("/pdctl/v1/state", tls=service.tls["b"])
    assert state["links"][0]["pulls"] == 1
    _, state = await service.a.call("/pdctl/v1/state", tls=service.tls["b"])
    assert state["leases"] == []


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no certificate", "it wants a certificate of its CA, and this process showed none"),
        ("another CA", "it does not know the CA of our certificate"),
        ("expired", "it says that our certificate has expired"),
    ],
)
@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/pdctl/v1/state"])
async def test_whoever_has_no_certificate_of_the_cluster_reaches_nothing(
    service: Service, tmp_path: Path, case: str, words: str, path: str
) -> None:
    if case == "another CA":
        made_node(made_ca(tmp_path / "ca"), tmp_path, "b", B)
    elif case == "expired":
        from pdctl.commands.cluster.authority import Authority

        made_node(Authority.read(service.folder / "ca"), tmp_path, "b", B, days=EXPIRED)
    context = stranger_context(tmp_path)
    status, said = await service.a.call(path, tls=lambda: context)
    assert status == 0
    assert words in said


async def test_whoever_speaks_plain_http_reaches_nothing(service: Service) -> None:
    status, _ = await service.a.call("/health")
    assert status == 0


async def test_a_certificate_does_not_replace_the_secret(service: Service) -> None:
    for path in ("/v1/models", "/pdctl/v1/state", "/metrics"):
        status, said = await service.a.call(path, tls=service.tls["b"], secret="another")
        assert (status, said["error"]["type"]) == (401, "authentication_error")


async def test_a_server_at_another_address_is_not_believed(service: Service) -> None:
    """Somebody who takes over an address of the cluster passes on what comes, to hear it."""
    async with passing_on("127.0.0.23", service.a) as port:
        status, said = await service.a.call("/health", tls=service.tls["b"], host="127.0.0.23", port=port)
    assert status == 0
    assert "its certificate is not accepted: IP address mismatch, certificate is not valid for '127.0.0.23'" in said


@asynccontextmanager
async def passing_on(host: str, to: Engine) -> AsyncIterator[int]:
    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(to.host, to.port)
        await asyncio.gather(copy(reader, back), copy(there, writer), return_exceptions=True)

    async with await asyncio.start_server(passed, host, 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_a_nodes_certificate_does_not_speak_for_another_nodes_engines(service: Service) -> None:
    """Node b has the secret and a good certificate, and says that it is an engine of node c."""
    lease = await held(service)
    theirs = {"lease_id": lease["lease_id"], "epoch": lease["epoch"], "holder": "decode-9@c~77-1"}
    words = "the certificate of node b does not speak for decode-9@c~77-1, which is of node c"
    for path, call in (
        ("claim", theirs),
        ("commit", theirs),
        ("renew", {**theirs, "lease_ids": [lease["lease_id"]]}),
    ):
        status, said = await service.a.call(f"/pdctl/v1/leases/{path}", call, service.tls["b"])
        assert (status, said["error"]["message"]) == (403, words)
    # Nothing has changed: its proxy holds it, and an engine of node b may claim it.
    _, state = await service.a.call("/pdctl/v1/state", tls=service.tls["b"])
    assert [found["holder"] for found in state["leases"]] == ["proxy@a~1-1"]
    own = {**theirs, "holder": service.b.holder}
    for verb in ("claim", "release"):
        status, said = await service.a.call(f"/pdctl/v1/leases/{verb}", own, service.tls["b"])
        assert (status, said["ok"]) == (200, True)


async def test_a_nodes_certificate_does_not_speak_for_another_nodes_proxy_or_offers(service: Service) -> None:
    body = {"prompt": "x", "max_tokens": 2, "temperature": 0, "kv_transfer_params": {"do_remote_decode": True}}
    status, said = await service.a.call("/v1/completions", body, service.tls["b"], x_pdctl_router="proxy@a~1-1")
    assert status == 403
    assert "the certificate of node b does not speak for proxy@a~1-1, which is of node a" in said["error"]["message"]
    given = await held(service)
    offer = {
        "engine": "prefill", "host": A, "port": service.a.port, "lease_id": given["lease_id"], "epoch": given["epoch"],
        "lease_s": 30.0, "num_tokens": 16, "readable": 16, "block_ids": [0], "endpoint": given["endpoint"],
    }  # fmt: skip
    status, said = await service.b.call("/pdctl/v1/offers", offer, service.tls["b"])
    assert status == 403
    assert "does not speak for a~4fa-1, which is of node a" in said["error"]["message"]
    call = {"lease_id": given["lease_id"], "epoch": given["epoch"], "holder": "anyone"}
    assert (await service.a.call("/pdctl/v1/leases/release", call, service.tls["a"]))[0] == 200


def test_an_engine_does_not_start_with_a_certificate_that_has_ended(tmp_path: Path, tiny_model: Path) -> None:
    who = made_node(made_ca(tmp_path / "ca"), tmp_path / "a", "a", A, days=EXPIRED)
    engine = started("prefill", A, "a~4fa-1", who, tiny_model)
    assert engine.process.wait(60) == 78
    said = (who / "log").read_text()
    assert f"error: the certificate in {who} cannot be used: certificate has expired" in said
