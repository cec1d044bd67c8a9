"""Answers of translated APIs as bytes of HTTP: heads, errors before and after the first event, timing."""

from __future__ import annotations

import asyncio
import json

import pytest

from pdctl.net import asgi
from pdctl.net.openai.api import ApiError, Counts
from pdctl.proxy.answers.sinks import Answer
from pdctl.proxy.answers.translated import TranslatedStream, TranslatedWhole
from pdctl.proxy.client.requests import parse
from pdctl.proxy.client.unknown_fields import UnknownFields
from pdctl.proxy.telemetry.timing import Timing
from pdctl.proxy.translation import APIS, CHAT_PATH, Api
from tests.proxy.translation.chats import events, part, whole

BODIES: dict[str, dict[str, object]] = {
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [], "max_tokens": 9},
}
TOOLS = {
    "/v1/responses": [{"type": "function", "name": "f"}],
    "/v1/messages": [{"name": "f", "input_schema": {"type": "object"}}],
}
apis = pytest.mark.parametrize("api", APIS.values(), ids=list(APIS))


class Client:
    """Receives one answer."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ended = False

    async def send(self, message: asgi.Message) -> None:
        assert not self.ended
        if message["type"] == "http.response.start":
            assert not self.status
            self.status = message["status"]
            self.headers = asgi.header_dict(message["headers"])
        else:
            assert self.status
            self.body += message["body"]
            self.ended = not message.get("more_body", False)


def answer(api: Api, client: Client, stream: bool, timing: Timing | None = None, **fields: object) -> Answer:
    body = json.dumps({**BODIES[api.path], "stream": stream, **fields}).encode()
    found = api.translate(body, UnknownFields())
    request = parse(found.chat_body(), CHAT_PATH, True, "r1", "m")
    kind = TranslatedStream if stream else TranslatedWhole
    return kind(request, api, found, client.send, [(b"x-request-id", b"r1")], timing)


@apis
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer(api: Api, stream: bool) -> None:
    async def main() -> Client:
        client, timing = Client(), Timing(received_at=10.0, admitted_at=10.5)
        found = answer(api, client, stream, timing)
        [sink] = found.sinks
        sink.prompt_tokens = 5
        await sink.add(part(content="a"), [1])
        assert bool(client.status) == stream
        timing.token(12.0)
        await sink.add(part("stop", content="b"), [2])
        await found.finish([None], Counts(5, 2))
        return client

    client = asyncio.run(main())
    assert (client.status, client.ended, client.headers["x-request-id"]) == (200, True, "r1")
    assert ("text/event-stream" in client.headers["content-type"]) == stream
    if stream:
        *shown, comment, rest = client.body.split(b"\n\n")
        assert (comment, rest) == (b": x-pdctl-timing queue;dur=500.000, ttft;dur=2000.000", b"")
        assert json.dumps(events(b"\n\n".join(shown) + b"\n\n")).count('"ab"') == (4 if "resp" in api.path else 0)
    else:
        assert client.headers["x-pdctl-timing"] == "queue;dur=500.000, ttft;dur=2000.000"
        assert b'"ab"' in client.body


@apis
@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_the_first_event_is_an_error_in_the_apis_form(api: Api, stream: bool) -> None:
    failure = ApiError(503, "no engine is ready", "service_unavailable", retry_after=5)
    client = Client()
    asyncio.run(answer(api, client, stream).fail(failure))
    assert (client.status, client.headers["retry-after"], client.headers["x-request-id"]) == (503, "5", "r1")
    assert client.body == api.error_body(failure, "r1")


@apis
def test_a_failure_after_the_first_event_ends_the_stream_with_an_error(api: Api) -> None:
    async def main() -> Client:
        client = Client()
        found = answer(api, client, stream=True)
        await found.sinks[0].add(part(content="a"), [1])
        await found.fail(ApiError(502, "it failed", "server_error"))
        return client

    client = asyncio.run(main())
    assert (client.status, client.ended) == (200, True)
    told = [event for event in events(client.body) if event["type"] == "error"]
    assert len(told) == 1
    assert "it failed" in json.dumps(told)


@apis
def test_a_stream_without_parts_has_all_its_events(api: Api) -> None:
    client = Client()
    asyncio.run(answer(api, client, stream=True).finish([None], Counts(1, 0)))
    assert (client.status, client.ended) == (200, True)
    assert events(client.body)


@apis
def test_an_engines_whole_body_is_translated(api: Api) -> None:
    message = {"role": "assistant", "content": "ab"}
    body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
    client = Client()
    found = answer(api, client, stream=False)
    assert found.sinks[0].takes_whole
    asyncio.run(found.finish([body], Counts(7, 3)))
    expected = whole(api, BODIES[api.path], [part(content="ab"), part("stop")])
    shown = json.loads(client.body)
    assert {**shown, "created_at": 0} == {**expected, "created_at": 0}


@apis
def test_with_tools_the_order_of_parts_matters(api: Api) -> None:
    """A whole message has its text before its calls, whatever the order was."""
    [sink] = answer(api, Client(), stream=False, tools=TOOLS[api.path]).sinks
    assert not sink.takes_whole


@apis
def test_nothing_is_passed_on_as_bytes(api: Api) -> None:
    [sink] = answer(api, Client(), stream=True).sinks
    assert not sink.passes
    assert not sink.part_now(b"x", b"")
    with pytest.raises(AssertionError, match="3 bytes"):
        asyncio.run(sink.pass_on(b"xxx"))
