"""A real etcd that wants certificates of the cluster, with a user for each node."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from pdctl.net.identity import identity_in
from pdctl.registry import Put, Refused, Unavailable
from pdctl.registry.etcd.gateway import Credentials, Gateway
from pdctl.registry.etcd.registry import EtcdRegistry
from pdctl.supervisor.cluster.entries import Keys
from tests.certificates import SERVICE, made_ca, made_node
from tests.registry import etcd
from tests.service import free_port, wait_until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.e2e,
    pytest.mark.skipif(etcd.BINARY is None, reason="NOT TESTED: etcd is not installed"),
]
HOST = "127.0.0.31"
KEYS = Keys(SERVICE)
# As docs/cluster.md grants them to a node: prefixes, and keys.
PREFIXES, SINGLE = (KEYS.engines_of("b"), KEYS.quarantine), (KEYS.node("b"), KEYS.turn)


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """The folders of nodes: `etcd`, `b`, and `stranger` of another CA."""
    ca = made_ca(tmp_path / "ca")
    made_node(ca, tmp_path / "etcd", "etcd", HOST)
    made_node(ca, tmp_path / "b", "b", "127.0.0.32")
    made_node(made_ca(tmp_path / "other"), tmp_path / "stranger", "b", "127.0.0.32")
    return tmp_path


@pytest.fixture
def url(nodes: Path) -> Iterator[str]:
    """A member without users."""
    client, peer = f"https://{HOST}:{free_port()}", f"http://127.0.0.1:{free_port()}"
    own = nodes / "etcd"
    argv = [
        *etcd.command("m", nodes, client, peer, f"m={peer}"), "--client-cert-auth", "--trusted-ca-file",
        str(own / "ca.pem"), "--cert-file", str(own / "node.pem"), "--key-file", str(own / "node.key"),
    ]  # fmt: skip
    with (nodes / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(client, nodes / "b"), what="etcd to be ready")
        yield client
    finally:
        process.kill()
        process.wait()


def answers(url: str, who: Path) -> bool:
    try:
        with httpx.Client(verify=identity_in(str(who)).client_context(), trust_env=False) as http:
            return http.post(f"{url}/v3/kv/range", json={"key": "AA=="}, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@asynccontextmanager
async def registry(url: str, who: Path, credentials: Credentials | None = None) -> AsyncIterator[EtcdRegistry]:
    made = EtcdRegistry(Gateway([url], identity_in(str(who)).lasting_context, credentials))
    try:
        yield made
    finally:
        await made.close()


def prepare(url: str, who: Path) -> None:
    """Users as docs/cluster.md makes them, by the calls that etcdctl makes."""
    def end_of(prefix: str) -> str:
        return prefix[:-1] + chr(ord(prefix[-1]) + 1)

    def coded(text: str) -> str:
        return b64encode(text.encode()).decode()

    def permission(kind: str, key: str, end: str) -> dict[str, object]:
        return {"permType": kind, "key": coded(key), "range_end": coded(end)}

    with httpx.Client(verify=identity_in(str(who)).client_context(), trust_env=False, base_url=url, timeout=30) as http:

        def call(path: str, **message: object) -> None:
            http.post(f"/v3/auth/{path}", json=message).raise_for_status()

        for user, password, role in (("root", "secret of root", "root"), ("b", "secret of b", "node-b")):
            call("user/add", name=user, password=password)
            call("role/add", name=role)
            call("user/grant", user=user, role=role)
        given = [permission("READ", KEYS.all, end_of(KEYS.all))]
        given += [permission("READWRITE", prefix, end_of(prefix)) for prefix in PREFIXES]
        given += [permission("READWRITE", key, "") for key in SINGLE]
        for one in given:
            call("role/grant", name="node-b", perm=one)
        call("enable")


async def test_a_node_s_certificate_opens_etcd_and_no_other_does(url: str, nodes: Path) -> None:
    async with registry(url, nodes / "b") as mine:
        assert await mine.write([Put("/a", b"1")]) is not None
        assert [entry.value for entry in (await mine.list("/a")).entries] == [b"1"]
    async with registry(url, nodes / "stranger") as other:
        with pytest.raises(Unavailable, match="certificate verify failed"):
            await other.list("/a")
    believes = ssl.create_default_context(cafile=nodes / "ca/ca.pem")
    unshown = EtcdRegistry(Gateway([url], lambda: believes))
    for _ in range(10):
        # The reason may be lost with the connection; that it is an error that agents survive may not.
        with pytest.raises(Unavailable):
            await unshown.list("/a")
        with pytest.raises(Unavailable):
            await unshown.watch("/a", 1, lambda changes: None)
    await unshown.close()


async def test_a_node_writes_what_its_own_node_says(url: str, nodes: Path) -> None:
    """With both: its certificate, and its user."""
    await asyncio.to_thread(prepare, url, nodes / "b")
    async with registry(url, nodes / "b", Credentials("b", "secret of b")) as mine:
        for key in (KEYS.node("b"), KEYS.engine("b", "decode-0"), KEYS.turn):
            assert await mine.write([Put(key, b"1")]) is not None
        assert len((await mine.list(KEYS.all)).entries) == 3
        for key in (KEYS.node("a"), KEYS.engine("a", "decode-0"), KEYS.topology, KEYS.order("b"), KEYS.coordinator):
            with pytest.raises(Refused, match="permission denied"):
                await mine.write([Put(key, b"1")])
        with pytest.raises(Refused):
            await mine.list("/pdctl/other/")
    async with registry(url, nodes / "b") as without:
        with pytest.raises(Refused):
            await without.list(KEYS.all)
