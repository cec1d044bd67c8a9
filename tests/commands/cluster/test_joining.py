"""A machine that joins a cluster, and a node that renews: over real TLS on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import ssl
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from pdctl.commands.cluster import joining
from pdctl.commands.cluster.authority import Authority, checked_addresses, new_key, now, validity_of
from pdctl.commands.cluster.folder import CaFolder, certify_here, is_due, joined_at, renew_here
from pdctl.commands.cluster.joining import JoinServer, renew
from pdctl.commands.cluster.tokens import Token, Tokens, read_token
from pdctl.errors import PdctlError
from pdctl.net.http_client import ConnectionPool, header_lines
from pdctl.net.identity import Who, identity_in
from pdctl.net.identity.files import write_file
from tests.news import News

pytestmark = pytest.mark.anyio
HOST = "127.0.0.1"
DAYS = 90.0


class Sayings(Protocol):
    """Takes what is said."""

    def append(self, line: str, /) -> None: ...


@pytest.fixture
def ca(tmp_path: Path) -> CaFolder:
    return CaFolder.create(tmp_path / "ca", "chat")


@asynccontextmanager
async def serving(ca: CaFolder, said: Sayings) -> AsyncIterator[int]:
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.get_running_loop().create_task(JoinServer(ca, DAYS, said.append).run(HOST, 0, port.set_result))
    try:
        yield await port
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def join(host: str, port: int, token: Token, folder: Path) -> str:
    return await joining.join(host, port, token, folder, folder / "secret")


def token(ca: CaFolder, node: str = "b", *addresses: str, life_s: float = 60.0) -> Token:
    return Tokens(ca.folder).make(ca.authority.fingerprint, node, addresses, time.time() + life_s)


async def test_a_machine_joins_once_with_a_token_and_renews_with_its_certificate(ca: CaFolder, tmp_path: Path) -> None:
    said: list[str] = []
    b, given = tmp_path / "b", token(ca)
    async with serving(ca, said) as port:
        assert await join(HOST, port, given, b) == "b"
        identity = identity_in(str(b))
        assert identity.who == Who("chat", "b")
        assert validity_of((b / "node.pem").read_bytes()).addresses == (HOST,)
        assert (b / "secret").read_bytes() == ca.secret
        for name in ("node.key", "secret"):
            assert (b / name).stat().st_mode & 0o777 == 0o600

        with pytest.raises(PdctlError, match=f"{HOST}:{port} refuses: this token is not known here, was used before"):
            await join(HOST, port, given, tmp_path / "thief")
        assert not (tmp_path / "thief").exists()

        before = (b / "node.pem").read_bytes()
        assert joined_at(b) == f"{HOST}:{port}"
        await renew(HOST, port, b)
        assert (b / "node.pem").read_bytes() != before
        assert identity_in(str(b)).who == Who("chat", "b")
    joined, refused, renewed = said
    assert joined == f"node b joined from {HOST}, with {HOST}"
    assert refused.startswith(f"refused {HOST}: this token is not known here")
    assert renewed == f"node b renewed its certificate from {HOST}"


async def test_nothing_is_shown_to_another_ca(ca: CaFolder, tmp_path: Path) -> None:
    said: list[str] = []
    other = CaFolder.create(tmp_path / "other", "chat")
    given = token(ca)
    async with serving(other, said) as port:
        with pytest.raises(PdctlError, match="is not the one of the token: nothing was sent to it"):
            await join(HOST, port, given, tmp_path / "b")
    assert said == []


async def test_who_may_not_join(ca: CaFolder, tmp_path: Path) -> None:
    late, good = token(ca, life_s=-1.0), token(ca)
    guessed = [late, good._replace(secret="A" * 43), good._replace(id="00000000"), good._replace(id="../ca.key")]
    async with serving(ca, []) as port:
        for one in guessed:
            with pytest.raises(PdctlError, match="this token is not known here, was used before, or has ended"):
                await join(HOST, port, one, tmp_path / "b")
        # None of them has used the good one up.
        assert await join(HOST, port, good, tmp_path / "b") == "b"


async def test_one_of_two_who_use_a_token_at_once_joins(ca: CaFolder, tmp_path: Path) -> None:
    given = token(ca)
    async with serving(ca, []) as port:
        calls = (join(HOST, port, given, tmp_path / f"b{number}") for number in range(2))
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(map(type, results), key=str) == [PdctlError, str]


async def test_a_token_that_the_ca_could_not_note_is_not_used_up(ca: CaFolder, tmp_path: Path) -> None:
    """The disk beside the CA is full for a while."""
    given = token(ca)
    (ca.folder / "issued").write_text("no folder")
    async with serving(ca, []) as port:
        with pytest.raises(PdctlError, match=r"refuses: .*issued/b\.json cannot be written"):
            await join(HOST, port, given, tmp_path / "b")
        assert not (tmp_path / "b").exists()
        (ca.folder / "issued").unlink()
        assert await join(HOST, port, given, tmp_path / "b") == "b"


async def test_a_machine_that_was_stopped_while_it_joined_has_not_joined(ca: CaFolder, tmp_path: Path) -> None:
    """A certificate says that all is there: an agent with one does not join again."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "b"
    async with serving(ca, []) as port:
        with pytest.raises(PdctlError, match="secret cannot be written"):
            await joining.join(HOST, port, token(ca), folder, tmp_path / "file/secret")
        assert not (folder / "node.pem").exists()
        await joining.join(HOST, port, token(ca), folder, folder / "secret")
    assert {path.name for path in folder.iterdir()} == {"node.key", "node.pem", "ca.pem", "secret", "joined.json"}


async def test_a_machine_cannot_say_that_it_joins_from_elsewhere(ca: CaFolder, tmp_path: Path) -> None:
    """Its certificate would have the address of another node. The server runs on loopback, whom uvicorn believes."""
    said: list[str] = []
    given, context = token(ca), ssl.create_default_context(cadata=ca.authority.pem.decode())
    call = joining.JoinCall(given.id, given.secret, new_key().request.decode())
    async with serving(ca, said) as port:
        pool = ConnectionPool(HOST, port, tls=lambda: context)
        headers = header_lines({"x-forwarded-for": "10.9.9.9", "content-type": "application/json"})
        answer = await pool.request("POST", "/join", headers, msgspec.json.encode(call))
        pool.close()
    made = msgspec.json.decode(answer.body, type=joining.Certified)
    assert validity_of(made.certificate.encode()).addresses == (HOST,)
    assert said == [f"node b joined from {HOST}, with {HOST}"]


async def test_a_server_that_cannot_renew_its_own_certificate_serves_on(
    ca: CaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Said(News):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def append(self, line: str) -> None:
            self.lines.append(line)
            self.tell()

    said = Said()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(joining, "_OWN_EVERY", 1e-7)
    async with serving(ca, said) as port:
        with monkeypatch.context() as patched:
            patched.setattr(tempfile, "NamedTemporaryFile", full)
            await said.until(lambda: bool(said.lines))
        assert await join(HOST, port, token(ca), tmp_path / "b") == "b"
    assert said.lines[0].endswith("No space left on device; again in 60 minutes")


async def test_a_folder_without_the_ca_says_so(tmp_path: Path) -> None:
    with pytest.raises(PdctlError, match="has no certificate of the CA: No such file"):
        await renew(HOST, 1, tmp_path)


@pytest.mark.parametrize("name", ["x" * 250, "file/x"])
def test_a_file_that_cannot_be_made_is_an_error_with_its_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PdctlError, match="cannot be written: "):
        write_file(tmp_path / name, b"")


async def test_who_may_not_renew(ca: CaFolder, tmp_path: Path) -> None:
    stranger, forgotten = tmp_path / "stranger", tmp_path / "forgotten"
    certify_here(CaFolder.create(tmp_path / "other", "chat"), "b", (HOST,), stranger, DAYS)
    certify_here(ca, "c", (HOST,), forgotten, DAYS)
    (ca.folder / "issued/c.json").unlink()
    async with serving(ca, []) as port:
        with pytest.raises(PdctlError, match="it is of another CA"):
            await renew(HOST, port, stranger)
        # One that believes our CA, and still shows a certificate of its own.
        (stranger / "ca.pem").write_bytes(ca.authority.pem)
        with pytest.raises(PdctlError, match="it does not know the CA of our certificate"):
            await renew(HOST, port, stranger)
        with pytest.raises(PdctlError, match="node c has no certificate of this CA that may be renewed"):
            await renew(HOST, port, forgotten)


async def test_a_server_that_is_not_at_its_address_is_not_believed(ca: CaFolder, tmp_path: Path) -> None:
    """Somebody with the CA's certificate, but without its key, answers in its place."""
    key = new_key()
    mine = CaFolder.create(tmp_path / "mine", "chat")
    (tmp_path / "fake.pem").write_bytes(key.pem + mine.authority.certify_server(key.request, HOST, 1.0))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "fake.pem")
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        pem = ca.authority.pem
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(pem) + pem)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async with await asyncio.start_server(answer, HOST, 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PdctlError, match="it is of another CA"):
            await join(HOST, port, token(ca), tmp_path / "b")
    assert [line.split()[:2] for line in heard] == [[b"GET", b"/ca"]]


async def test_a_join_server_listens_at_one_address(ca: CaFolder) -> None:
    for host in ("0.0.0.0", "::", "localhost"):
        with pytest.raises(PdctlError, match=f"{host} is not the address of a machine"):
            await JoinServer(ca, DAYS, lambda _: None).run(host, 0)


def test_the_token_says_the_addresses(ca: CaFolder, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(ca, []) as port:
            await join(HOST, port, token(ca, "b", "10.0.0.2", "fd00::2"), tmp_path / "b")

    asyncio.run(main())
    assert validity_of((tmp_path / "b/node.pem").read_bytes()).addresses == ("10.0.0.2", "fd00::2")


def test_a_ca_is_made_once_and_read_whole(tmp_path: Path) -> None:
    made = Authority.create(tmp_path, "chat")
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600
    assert Authority.read(tmp_path).fingerprint == made.fingerprint
    assert made.service == "chat"
    with pytest.raises(PdctlError, match="has a CA already"):
        Authority.create(tmp_path, "chat")
    (tmp_path / "ca.key").write_bytes(new_key().pem)
    with pytest.raises(PdctlError, match="is not the key of"):
        Authority.read(tmp_path)


def test_a_certificate_has_no_common_name_and_is_due_at_half_of_its_life(ca: CaFolder, tmp_path: Path) -> None:
    from cryptography import x509

    certify_here(ca, "a", ("10.0.0.1",), tmp_path / "a", DAYS)
    pem = (tmp_path / "a/node.pem").read_bytes()
    names = x509.load_pem_x509_certificate(pem).subject
    assert not names.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    validity = validity_of(pem)
    # Clocks differ.
    assert 3590 < (now() - validity.begins).total_seconds() < 3700
    assert not is_due(tmp_path / "a")[0]
    assert validity.is_due(validity.begins + (validity.ends - validity.begins) * 0.5)
    renew_here(ca, tmp_path / "a", DAYS)
    assert (tmp_path / "a/node.pem").read_bytes() != pem
    certify_here(ca, "a", ("10.0.0.1",), tmp_path / "a", 0.02)
    assert is_due(tmp_path / "a")[0]


def test_what_is_not_an_address_a_node_or_a_token(ca: CaFolder, tmp_path: Path) -> None:
    for address in ("0.0.0.0", "host.example", "10.0.0.0/24", ""):
        with pytest.raises(PdctlError, match="is not the address of a machine"):
            checked_addresses([address])
    for node in ("../x", "a/b", "", ".x", "a~b", "x" * 254):
        with pytest.raises(PdctlError, match="is not a node's name"):
            certify_here(ca, node, ("10.0.0.1",), tmp_path / "x", DAYS)
    (tmp_path / "t").write_text(token(ca).text + "\n")
    assert read_token(tmp_path / "t").ca == ca.authority.fingerprint
    (tmp_path / "t").write_text("secret")
    with pytest.raises(PdctlError, match="has no token of pdctl cluster token"):
        read_token(tmp_path / "t")
