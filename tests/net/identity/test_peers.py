from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdctl.net.identity import PEER, Who, uri_of, who_is
from pdctl.net.identity.peers import NodesOnly, claims_too_much


@pytest.mark.parametrize(
    ("uris", "who"),
    [
        ([uri_of("demo", "b.example-1")], Who("demo", "b.example-1")),
        ([], None),
        (["spiffe://demo/node/a", "spiffe://demo/node/b"], None),
        (["spiffe://demo/node/"], None),
        (["spiffe://demo/node/a/b"], None),
        (["spiffe://demo/node/a~b"], None),
        (["spiffe://demo/workload/a"], None),
        (["https://demo/node/a"], None),
    ],
)
def test_a_certificate_names_one_node(uris: list[str], who: Who | None) -> None:
    assert who_is(uris) == who


@pytest.mark.parametrize(
    ("holder", "words"),
    [
        ("decode-0@b~4fa-1", ""),
        ("b~4fa-1", ""),
        ("decode-0@a~4fa-1", "the certificate of node b does not speak for decode-0@a~4fa-1, which is of node a"),
        ("decode-0@4fa-1", "which is of no node"),
        ("b~1@a~4fa-1", "which is of node a"),
        ("", "which is of no node"),
        ("decode-0@bb~4fa-1", "which is of node bb"),
    ],
)
def test_a_node_speaks_for_its_own_holders(holder: str, words: str) -> None:
    refused = claims_too_much({PEER: Who("demo", "b")}, holder)
    assert (refused is None) == (not words)
    assert refused is None or words in refused.message
    # On one machine nobody has certificates, and nothing is checked.
    assert claims_too_much({}, holder) is None


def test_only_nodes_of_the_service_are_served_and_name_themselves_as_routers() -> None:
    sent: list[Any] = []

    async def app(_: Any, __: Any, send: Any) -> None:
        await send("served")

    async def send(message: Any) -> None:
        sent.append(message)

    def answers(peer: dict[str, Who | None], *routers: str) -> list[Any]:
        headers = [(b"x-pdctl-router", router.encode()) for router in routers]
        scope = {"type": "http", "headers": headers, **peer}
        sent.clear()
        asyncio.run(NodesOnly(app, "demo")(scope, None, send))
        return list(sent)

    assert answers({PEER: Who("demo", "b")}) == ["served"]
    assert answers({PEER: Who("demo", "b")}, "proxy@b~1-2") == ["served"]
    assert answers({PEER: Who("demo", "b")}, "proxy@b~1-2", "proxy@b~1-3") == ["served"]
    refused: tuple[tuple[dict[str, Who | None], tuple[str, ...], bytes], ...] = (
        ({}, (), b"names no node"),
        ({PEER: None}, (), b"names no node"),
        ({PEER: Who("other", "b")}, (), b"b is a node of service 'other', and this is 'demo'"),
        ({PEER: Who("demo", "b")}, ("proxy@a~1-2",), b"does not speak for proxy@a~1-2"),
        ({PEER: Who("demo", "b")}, ("router",), b"which is of no node"),
        # A reader of headers may take the first or the last one.
        ({PEER: Who("demo", "b")}, ("proxy@b~1-2", "proxy@a~1-2"), b"does not speak for proxy@a~1-2"),
        ({PEER: Who("demo", "b")}, ("proxy@a~1-2", "proxy@b~1-2"), b"does not speak for proxy@a~1-2"),
    )
    for peer, routers, words in refused:
        head, body = answers(peer, *routers)
        assert head["status"] == 403
        assert words in body["body"]
