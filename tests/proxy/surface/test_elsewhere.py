"""What a proxy takes from its agent, and tells it: bodies in quarantine, and what API keys used."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette

from pdctl.net.openai.api import ApiError
from pdctl.proxy.request.quarantine import Quarantine
from pdctl.proxy.shares.accounts import Accounts, LimitReached
from pdctl.proxy.shares.rules import KeyRules
from pdctl.proxy.surface.elsewhere import ElsewhereSurface
from pdctl.proxy.surface.internal import Internal
from pdctl.proxy_wire import KeySettings, KeySpent, Quarantined, SourceSpent, SpentNews, SpentReply


def completions() -> Any:
    rules = KeyRules((KeySettings("a", requests_per_minute=6, streams=4),))
    return SimpleNamespace(shared=SimpleNamespace(quarantine=Quarantine("secret")), accounts=Accounts(rules))


def call(proxy: Any, path: str, message: object = None, given: str = "Bearer secret") -> httpx.Response:
    app = Starlette(routes=ElsewhereSurface(proxy, Internal("secret"), "e1").routes())
    body = message if isinstance(message, bytes) else msgspec.json.encode(message)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
            headers = {"authorization": given}
            if message is None:
                return await client.get(path, headers=headers)
            return await client.post(path, headers=headers, content=body)

    return asyncio.run(ask())


def test_only_for_the_supervisor() -> None:
    proxy = completions()
    for path, message in (
        ("quarantine", None), ("quarantine", Quarantined({"00" * 16: 9.0})), ("spent", SpentNews({}, {})),
    ):  # fmt: skip
        assert call(proxy, f"/pdctl/v1/{path}", message, "Bearer other").status_code == 403
    assert not proxy.shared.quarantine._elsewhere


def test_bodies_go_from_one_proxy_to_another() -> None:
    one, other = completions(), completions()
    one.shared.quarantine.put(b"body")
    found = msgspec.json.decode(call(one, "/pdctl/v1/quarantine").content, type=Quarantined)
    assert len(found.bodies) == 1
    answer = call(other, "/pdctl/v1/quarantine", found)
    assert msgspec.json.decode(answer.content, type=Quarantined) == Quarantined({})
    with pytest.raises(ApiError):
        other.shared.quarantine.check(b"body")


def test_what_was_spent_elsewhere_is_spent_here() -> None:
    one, other = completions(), completions()
    nothing = SpentNews({}, {})
    for proxy in (one, other):
        reply = msgspec.json.decode(call(proxy, "/pdctl/v1/spent", nothing).content, type=SpentReply)
        assert reply == SpentReply("e1", {})
    for _ in range(4):
        assert one.accounts.claim("a", 1, 1, 1) is not None
    reply = msgspec.json.decode(call(one, "/pdctl/v1/spent", nothing).content, type=SpentReply)
    assert reply.keys["a"].requests == 4
    news = SpentNews({"one/proxy@e1": SourceSpent(0.1, reply.keys)}, {})
    for _ in range(2):
        assert call(other, "/pdctl/v1/spent", news).status_code == 200
    assert other.accounts.remaining("a")[0] == pytest.approx(2, abs=1)
    with pytest.raises(LimitReached, match="answers at once"):
        other.accounts.claim("a", 1, 1, 1)
    unlimited = SpentNews({"one/proxy@e1": SourceSpent(0.1, {"b": KeySpent(5, 5, 5, 5, 5)})}, {})
    assert call(other, "/pdctl/v1/spent", unlimited).status_code == 200
    assert other.accounts.claim("a", 1, 1, 2) is not None, "the answers there are over"
    assert other.accounts.claim("b", 1, 1, 9) is None


@pytest.mark.parametrize("path", ["quarantine", "spent"])
@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b'{"bodies":{"x":1},"elsewhere":1}'])
def test_nonsense_is_refused_and_changes_nothing(path: str, body: bytes) -> None:
    assert call(completions(), f"/pdctl/v1/{path}", body).status_code == 400
