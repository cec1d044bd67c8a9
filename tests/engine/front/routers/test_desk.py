"""The words in which a prefill's answer tells a router of its KV, and which engines a decode engine asks for it."""

from __future__ import annotations

import asyncio

import pytest

from pdctl.engine.front.routers.desk import RouterDesk
from pdctl.engine.front.routers.seal import Seal
from pdctl.engine.front.routers.transfers import Router, Transfer
from pdctl.net.openai.fields import MigrationRequest
from pdctl.wire import HandOver, LinkCall, PeerAddress, SessionCall
from tests.engine.front.handover.rig import Rig, rig
from tests.engine.front.routers.given import hand_over

SEAL = Seal("secret")
ABSENT = 1  # nothing listens on port 1


def desk(parts: Rig) -> RouterDesk:
    return RouterDesk(SEAL, parts.prefill.desk, parts.links, parts.peers)


def test_each_router_is_told_in_its_words() -> None:
    async def scenario() -> None:
        async with rig() as parts:
            book, given = desk(parts), hand_over()
            assert book.fields(Router.OURS, given, [7]) == {"kv_transfer_params": given}
            assert book.fields(Router.VLLM, given, [7]) == {"kv_transfer_params": SEAL.sealed(given)}
            told = book.fields(Router.LMDEPLOY, given, [7])
            session = told["cache_session_id"]
            assert isinstance(session, int)
            assert told == {
                "id": str(session), "cache_session_id": session, "cache_block_ids": [1, 2], "remote_token_ids": [7]
            }  # fmt: skip
            assert book.take(SessionCall(session)).hand_over == given
            assert book.take(SessionCall(session)).hand_over is None

    asyncio.run(scenario())


def test_an_output_that_has_ended_has_no_kv() -> None:
    """LMDeploy's proxy needs a number in any case."""

    async def scenario() -> None:
        async with rig() as parts:
            book = desk(parts)
            assert book.fields(Router.OURS, None, [7]) == book.fields(Router.VLLM, None, [7]) == {}
            told = book.fields(Router.LMDEPLOY, None, [7])
            assert int(str(told["id"])) > 0
            assert (told["cache_block_ids"], told["remote_token_ids"]) == ([], [7])

    asyncio.run(scenario())


def test_a_freed_session_ends_its_lease() -> None:
    async def scenario() -> None:
        async with rig() as parts:
            book, lease = desk(parts), parts.prefill.grant()
            session = book.fields(Router.LMDEPLOY, parts.given(lease), [7])["cache_session_id"]
            assert isinstance(session, int)
            book.free(session + 1)
            assert parts.prefill.desk.table.live() == [lease]
            book.free(session)
            assert parts.prefill.desk.table.live() == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("url", "found"),
    [
        (f"http://127.0.0.1:{ABSENT}", True),
        (f"http://localhost:{ABSENT}/", True),
        ("http://127.0.0.1:2", False),
        (f"http://192.0.2.1:{ABSENT}", False),
        (f"http://no.such.host.invalid:{ABSENT}", False),
        ("http://[", False),
        ("http://127.0.0.1:99999", False),
        ("dummy:dummy", False),
        ("", False),
    ],
)
def test_only_linked_engines_are_called(url: str, found: bool) -> None:
    """A call carries the run's secret, and a router may name any URL."""

    async def scenario() -> None:
        async with rig() as parts:
            peer = PeerAddress("p0", "127.0.0.1", ABSENT, "pe")
            await parts.links.make(LinkCall([peer]))
            assert await desk(parts).peer_at(url) == (peer if found else None)

    asyncio.run(scenario())


def test_what_cannot_be_fetched_is_computed() -> None:
    async def scenario() -> HandOver | None:
        async with rig() as parts:
            await parts.links.make(LinkCall([PeerAddress("p0", "127.0.0.1", ABSENT, "pe")]))
            return await desk(parts).fetch(MigrationRequest(f"http://127.0.0.1:{ABSENT}", 5, 7, [1, 2]))

    assert asyncio.run(scenario()) is None


def test_the_kv_of_a_refused_request_is_released() -> None:
    async def scenario() -> None:
        async with rig() as parts:
            lease = parts.prefill.grant()
            await desk(parts).let_go(Transfer(Router.VLLM, hand_over=parts.given(lease)))
            await parts.prefill.call("release")
            assert parts.prefill.desk.table.live() == []

    asyncio.run(scenario())
