from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop

from pdctl.commands.cluster.authority import Authority, new_key
from pdctl.errors import PdctlError
from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.net.http_protocol import HttpProtocol
from pdctl.net.identity import CERTIFICATES_ENV, ContextFactory, Who, contexts, identity_for, own_identity
from pdctl.net.identity.contexts import Identity
from pdctl.net.identity.peers import NodesOnly
from pdctl.net.serving import Server, listen_tcp, wants_certificates
from tests.certificates import EXPIRED, SERVICE, made_ca, made_node, stranger_context

# Servers are engines with asyncio's loop and proxies with uvloop's; each words failures of TLS in its own way.
LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
Loop = Callable[[], asyncio.AbstractEventLoop]


def run(loop: Loop, main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main)


async def told(scope: Any, _: Any, send: Any) -> None:
    who = scope["pdctl.peer"]
    body = f"{who.service}/{who.node}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(identity: Identity, host: str = "127.0.0.1") -> AsyncIterator[int]:
    listener = listen_tcp(host, 0)
    config = uvicorn.Config(
        NodesOnly(told, SERVICE), http=HttpProtocol, lifespan="off", loop="none", ws="none", log_level="warning",
        ssl_context_factory=wants_certificates(identity),
    )  # fmt: skip
    server = Server(config)
    running = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def asked(port: int, tls: ContextFactory | None, host: str = "127.0.0.1") -> str:
    pool = ConnectionPool(host, port, tls=tls)
    try:
        answer = await pool.request("GET", "/", timeout_s=60)
        return f"{answer.status} {answer.body.decode()}"
    except Unreachable as failure:
        return str(failure)
    finally:
        pool.close()


@LOOPS
def test_nodes_of_one_service_talk_and_know_each_other(tmp_path: Path, loop: Loop) -> None:
    ca = made_ca(tmp_path / "ca")
    a = Identity(made_node(ca, tmp_path / "a", "a", "127.0.0.1"))
    b = Identity(made_node(ca, tmp_path / "b", "b", "127.0.0.2"))
    assert a.who == Who(SERVICE, "a")

    async def main() -> None:
        async with serving(a) as port:
            assert await asked(port, b.client_context) == "200 test/b"

    run(loop, main())


@LOOPS
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("none", "it wants a certificate of its CA, and this process showed none"),
        ("other CA", "it does not know the CA of our certificate"),
        ("expired", "it says that our certificate has expired"),
        ("server only", "it says that our certificate is not one for clients"),
    ],
)
def test_a_client_without_a_good_certificate_reaches_nothing(
    tmp_path: Path, loop: Loop, case: str, words: str
) -> None:
    ca = made_ca(tmp_path / "ca")
    server = Identity(made_node(ca, tmp_path / "a", "a", "127.0.0.1"))
    folder = tmp_path / "stranger"
    if case == "other CA":
        made_node(made_ca(tmp_path / "other"), folder, "b", "127.0.0.2")
    elif case == "expired":
        made_node(ca, folder, "b", "127.0.0.2", days=EXPIRED)
    elif case == "server only":
        made_node(ca, folder, "b", "127.0.0.2")
        key = new_key()
        (folder / "node.key").write_bytes(key.pem)
        (folder / "node.pem").write_bytes(ca.certify_server(key.request, "127.0.0.2", 1.0))
    context = stranger_context(folder)

    async def main() -> None:
        async with serving(server) as port:
            said = await asked(port, lambda: context)
            assert words in said, said

    run(loop, main())


@LOOPS
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("address", "its certificate is not accepted: IP address mismatch, certificate is not valid for '127.0.0.3'"),
        ("other CA", "its certificate is not accepted: it is of another CA"),
        ("plain", "cannot be reached"),
    ],
)
def test_a_server_that_is_not_the_node_is_not_believed(tmp_path: Path, loop: Loop, case: str, words: str) -> None:
    ca = made_ca(tmp_path / "ca")
    client = Identity(made_node(ca, tmp_path / "b", "b", "127.0.0.2"))
    theirs = made_ca(tmp_path / "other", "else") if case == "other CA" else ca
    server = Identity(made_node(theirs, tmp_path / "a", "a", "127.0.0.1"))

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def main() -> None:
        if case == "plain":
            async with await asyncio.start_server(plain, "127.0.0.1", 0) as made:
                said = await asked(made.sockets[0].getsockname()[1], client.client_context)
        else:
            host = "127.0.0.3" if case == "address" else "127.0.0.1"
            async with serving(server, host) as port:
                said = await asked(port, client.client_context, host)
        assert words in said, said

    run(loop, main())


def test_a_plain_client_gets_no_answer(tmp_path: Path) -> None:
    server = Identity(made_node(made_ca(tmp_path / "ca"), tmp_path / "a", "a", "127.0.0.1"))

    async def main() -> None:
        async with serving(server) as port:
            said = await asked(port, None)
            assert "200" not in said, said

    asyncio.run(main())


def test_a_node_of_another_service_is_refused(tmp_path: Path) -> None:
    """One CA for several services is the operator's choice; then the name decides."""
    ca = made_ca(tmp_path / "ca")
    a = Identity(made_node(ca, tmp_path / "a", "a", "127.0.0.1"))

    class Other(Authority):
        service = "other"

    b = Identity(made_node(Other(ca._certificate, ca._key), tmp_path / "b", "b", "127.0.0.2"))

    async def main() -> None:
        async with serving(a) as port:
            said = await asked(port, b.client_context)
            assert said.startswith("403 ")
            assert "b is a node of service 'other', and this is 'test'" in said

    asyncio.run(main())


@LOOPS
def test_renewed_certificates_are_used_without_a_restart(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "LOOK_S", 0.0)
    ca = made_ca(tmp_path / "ca")
    a = Identity(made_node(ca, tmp_path / "a", "a", "127.0.0.1"))
    b = Identity(made_node(ca, tmp_path / "b", "b", "127.0.0.2"))
    lasting, ended = b.lasting_context(), a.ends

    async def shown(port: int) -> bytes:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=b.client_context())
        found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        await writer.wait_closed()
        return found

    async def main() -> None:
        async with serving(a) as port:
            before, first = await shown(port), b.client_context()
            made_node(ca, tmp_path / "a", "a", "127.0.0.1", days=2)
            made_node(ca, tmp_path / "b", "b", "127.0.0.2", days=2)
            assert await shown(port) != before
            assert b.client_context() is not first
            assert b.lasting_context() is lasting
            assert a.ends > ended + 80_000
            assert await asked(port, lambda: lasting) == "200 test/b"

    run(loop, main())


def test_files_that_do_not_fit_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contexts, "LOOK_S", 0.0)
    ca = made_ca(tmp_path / "ca")
    folder = made_node(ca, tmp_path / "a", "a", "127.0.0.1")
    identity = Identity(folder)
    before = identity.client_context()
    (folder / "node.key").write_bytes(made_node(ca, tmp_path / "x", "a", "127.0.0.1").joinpath("node.key").read_bytes())
    assert identity.client_context() is before
    made_node(ca, folder, "b", "127.0.0.1")
    assert identity.client_context() is before
    made_node(ca, folder, "a", "127.0.0.1", days=EXPIRED)
    assert identity.client_context() is before
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "node.key is not the key of node.pem" in said[0]
    assert "is of another node, b" in said[1]
    assert "certificate has expired" in said[2]


def test_what_cannot_be_used_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ca = made_ca(tmp_path / "ca")
    folder = made_node(ca, tmp_path / "a", "a", "127.0.0.1", days=EXPIRED)
    monkeypatch.setenv(CERTIFICATES_ENV, str(folder))
    with pytest.raises(PdctlError, match="certificate has expired"):
        own_identity()
    made_node(ca, folder, "a", "127.0.0.1")
    (folder / "node.key").chmod(0o644)
    with pytest.raises(PdctlError, match="every user of this machine may read"):
        own_identity()
    (folder / "node.key").chmod(0o600)
    found = own_identity()
    assert found is not None
    assert found.who.node == "a"
    (folder / "node.pem").write_text("nothing")
    with pytest.raises(PdctlError, match="cannot be used"):
        own_identity()
    (folder / "node.pem").unlink()
    with pytest.raises(PdctlError, match=r"No such file or directory: .*node\.pem"):
        own_identity()
    monkeypatch.delenv(CERTIFICATES_ENV)
    assert own_identity() is None


def test_a_certificate_of_another_node_is_not_this_node_s(tmp_path: Path) -> None:
    folder = str(made_node(made_ca(tmp_path / "ca"), tmp_path / "a", "a", "127.0.0.1"))
    assert identity_for(folder, SERVICE, "a").who.node == "a"
    with pytest.raises(PdctlError, match="is of node a of service test, not of node b of service test"):
        identity_for(folder, SERVICE, "b")


def test_processes_of_one_machine_do_not_load_ssl_for_it() -> None:
    code = "import sys, pdctl.net.identity; assert 'ssl' not in sys.modules and 'cryptography' not in sys.modules"
    assert os.spawnv(os.P_WAIT, os.sys.executable, [os.sys.executable, "-c", code]) == 0  # type: ignore[attr-defined]


def test_only_tls_1_3_is_spoken(tmp_path: Path) -> None:
    identity = Identity(made_node(made_ca(tmp_path / "ca"), tmp_path / "a", "a", "127.0.0.1"))
    for context in (identity.server_context(), identity.client_context()):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert identity.server_context().verify_mode is ssl.CERT_REQUIRED
    assert identity.client_context().check_hostname
