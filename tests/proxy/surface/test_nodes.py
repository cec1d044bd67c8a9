"""The key of a registration: HTTP's basic authentication, as `requests` makes it of a URL."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from pdctl.control_api import Node, Nodes, NodeStatus, Reply
from pdctl.errors import NotRunning
from pdctl.proxy.surface.nodes import NodeSurface, password_of
from pdctl.proxy_wire import ProxyConfig

AUTH = {"authorization": "Bearer right"}
URL = "http://10.0.0.7:23333"
ADD = {"url": URL, "status": {"role": 3, "models": ["m"]}}


def basic(text: bytes) -> bytes:
    return b"Basic " + base64.b64encode(text)


@pytest.mark.parametrize(
    ("header", "password"),
    [
        (basic(b"user:key"), b"key"),
        (basic(b":key:with:colons"), b"key:with:colons"),
        (basic(b"user").replace(b"Basic", b"bAsIc"), b""),
        (b"Basic !!", b""),
        (b"Basic", b""),
        (b"Bearer dTprZXk=", b""),
        (b"", b""),
    ],
)
def test_a_password_is_what_basic_authentication_says(header: bytes, password: bytes) -> None:
    assert password_of(header) == password


class Supervisor:
    """The control API's client, of a supervisor that does this."""

    def __init__(self, reply: Reply | None) -> None:
        self.reply = reply
        self.added: list[Node] = []
        self.removed: list[str] = []

    def _answer(self) -> Reply:
        if self.reply is None:
            raise NotRunning("the supervisor of service 't' is gone")
        return self.reply

    def add_node(self, node: Node) -> Reply:
        self.added.append(node)
        return self._answer()

    def remove_node(self, name: str) -> Reply:
        self.removed.append(name)
        return self._answer()

    def nodes(self) -> Nodes:
        self._answer()
        shown = NodeStatus(
            kind="lmdeploy", role="decode", host="10.0.0.7", port=23333, models=("m",), unfinished=2, latency=(0.5,)
        )
        return Nodes(nodes=(shown,))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "nodes.keys"
    path.write_text(f"box sha256:{hashlib.sha256(b'right').hexdigest()}\n")
    return path


def asked(
    keys: Path, supervisor: Supervisor, call: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]
) -> httpx.Response:
    async def run() -> httpx.Response:
        config = ProxyConfig("t", "m", "random", 1, 1, 16, [], run_dir=str(keys.parent), node_keys=str(keys))
        surface = NodeSurface(lambda: config)
        surface._control = supervisor  # type: ignore[assignment]
        transport = httpx.ASGITransport(Starlette(routes=surface.routes()), client=("10.0.0.9", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await call(client)

    return asyncio.run(run())


@pytest.mark.parametrize("way", ["http://box:right@proxy", "bearer", "x-api-key"])
def test_a_key_may_come_in_three_ways(keys: Path, way: str) -> None:
    supervisor = Supervisor(Reply(ok=True))
    base = way if way.startswith("http") else "http://proxy"
    headers = {"bearer": AUTH, "x-api-key": {"x-api-key": "right"}}.get(way, {})
    found = asked(keys, supervisor, lambda client: client.post(f"{base}/nodes/add", json=ADD, headers=headers))
    assert (found.status_code, found.json()) == (200, "Added successfully")
    assert [(node.name, node.role, node.models) for node in supervisor.added] == [("10.0.0.7:23333", "decode", ("m",))]


@pytest.mark.parametrize("path", ["add", "remove", "terminate", "status", "terminate_all"])
def test_without_a_key_nothing_happens(keys: Path, path: str) -> None:
    supervisor = Supervisor(Reply(ok=True))
    method = "GET" if path in ("status", "terminate_all") else "POST"

    wrong: list[dict[str, str]] = [
        {}, {"authorization": "Bearer wrong"}, {"authorization": basic(b"right:wrong").decode()},
    ]  # fmt: skip

    def calling(headers: dict[str, str]) -> Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]:
        return lambda client: client.request(method, f"/nodes/{path}", headers=headers)

    for headers in wrong:
        found = asked(keys, supervisor, calling(headers))
        assert found.status_code == 401
        assert "node_keys" in found.json()["error"]["message"]
    assert not supervisor.added
    assert not supervisor.removed


def test_a_removed_key_does_not_work_any_more(keys: Path) -> None:
    def status() -> int:
        return asked(
            keys, Supervisor(Reply(ok=True)), lambda client: client.get("/nodes/status", headers=AUTH)
        ).status_code

    assert status() == 200
    keys.write_text("# none\n")
    assert status() == 401
    keys.unlink()
    assert status() == 503


def test_a_status_has_lmdeploys_form(keys: Path) -> None:
    found = asked(keys, Supervisor(Reply(ok=True)), lambda client: client.get("/nodes/status", headers=AUTH)).json()
    assert found == {URL: {"role": 3, "models": ["m"], "unfinished": 2, "latency": [0.5], "speed": None}}


@pytest.mark.parametrize(("reply", "status"), [(Reply(ok=False, reason="no room"), 409), (None, 503)])
def test_a_refusal_has_the_supervisors_reason(keys: Path, reply: Reply | None, status: int) -> None:
    found = asked(keys, Supervisor(reply), lambda client: client.post("/nodes/add", json=ADD, headers=AUTH))
    assert found.status_code == status
    assert (reply.reason if reply else "is gone") in found.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"no", b"[]", json.dumps({"url": "x"}).encode(), b"{" + b" " * 70_000])
def test_a_body_that_is_no_registration_is_refused(keys: Path, body: bytes) -> None:
    supervisor = Supervisor(Reply(ok=True))
    found = asked(keys, supervisor, lambda client: client.post("/nodes/add", content=body, headers=AUTH))
    assert found.status_code in (400, 413)
    assert supervisor.added == []


def test_an_engine_on_all_addresses_is_the_one_that_calls(keys: Path) -> None:
    supervisor = Supervisor(Reply(ok=True))
    everywhere = ADD | {"url": "http://0.0.0.0:23333"}
    asked(keys, supervisor, lambda client: client.post("/nodes/add", json=everywhere, headers=AUTH))
    assert [node.name for node in supervisor.added] == ["10.0.0.9:23333"]
