"""Translated APIs over engines that fail: the answer continues, or ends with an error in the API's form."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from pdctl.adapters import Choice
from pdctl.net import asgi
from pdctl.net.openai.api import Counts
from pdctl.proxy.answers.translated import TranslatedStream
from pdctl.proxy.client.requests import parse
from pdctl.proxy.client.unknown_fields import UnknownFields
from pdctl.proxy.translation import APIS, CHAT_PATH, Api
from tests.proxy.request.scripted import Act, Gathering, Outcome, answer, pair, relay
from tests.proxy.translation.chats import Json, events

ASKED: dict[str, Json] = {
    "/v1/responses": {"input": "hi", "stream": True, "max_output_tokens": 9},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 9},
}
TOOLS: dict[str, Json] = {
    "/v1/responses": {"tools": [{"type": "function", "name": "f"}]},
    "/v1/messages": {"tools": [{"name": "f", "input_schema": {"type": "object"}}]},
}
apis = pytest.mark.parametrize("api", APIS.values(), ids=list(APIS))

# What vLLM's prefill engine answers: its token is discarded.
HELD = answer(200, {
    "choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "length"}], "usage": {"prompt_tokens": 5},
    "kv_transfer_params": {"remote_engine_id": "e"},
})  # fmt: skip


class Translating(Gathering):
    """Passes all to the sink of a translated answer."""

    def __init__(self, to: TranslatedStream) -> None:
        super().__init__()
        self._to = to.sinks[0]

    async def add(self, choice: Choice, token_ids: list[int]) -> None:
        await self._to.add(choice, token_ids)

    def start_over(self) -> bool:
        return self._to.start_over()


def chunks(path: str, deltas: list[Json], reason: str | None) -> Act:
    """A stream of one token per delta. Without `reason`, its connection is cut after the last."""

    async def act(writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for number, delta in enumerate(deltas):
            last = reason if number == len(deltas) - 1 else None
            body = {"text": delta["content"]} if path == "/v1/completions" else {"delta": delta}
            choice = {"index": 0, **body, "finish_reason": last, "token_ids": [number + 1]}
            first = {"prompt_token_ids": [7, 8]} if number == 0 else {}
            data = b"data: %b\n\n" % msgspec.json.encode({"choices": [choice], **first})
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" if reason else b"")
        await writer.drain()
        return reason is not None

    return act


def relayed(api: Api, asked: Json, prefill: list[Act], decode: list[Act]) -> tuple[Outcome, list[Json]]:
    """The relay of a request over a pair of vLLM engines, and the events that its client got."""
    sent: list[bytes] = []

    async def send(message: asgi.Message) -> None:
        sent.append(message.get("body", b""))

    async def main() -> Outcome:
        found = api.translate(json.dumps(asked).encode(), UnknownFields())
        request = parse(found.chat_body(), CHAT_PATH, True, "r1", "m")
        stream = TranslatedStream(request, api, found, send, [])
        chat = msgspec.json.decode(msgspec.json.encode(request.legs[0]))
        outcome = await relay(*pair(prefill, decode), kind="vllm", sink=Translating(stream), chat=chat, max_tokens=9)
        if outcome.error is None:
            await stream.finish([None], Counts(5, len(outcome.leg.state.emitted)))
        else:
            await stream.fail(outcome.error)
        return outcome

    return asyncio.run(main()), events(b"".join(sent))


@apis
def test_a_text_continues_on_another_try(api: Api) -> None:
    cut = chunks(CHAT_PATH, [{"role": "assistant", "content": "a"}, {"content": "b"}], None)
    rest = chunks("/v1/completions", [{"content": "c"}, {"content": "d"}], "stop")
    outcome, found = relayed(api, ASKED[api.path], [HELD, HELD], [cut, rest])
    assert outcome.error is None
    assert "".join(_texts(found)) == "abcd"
    assert found[-1]["type"] in ("response.completed", "message_stop")


@apis
def test_a_tool_call_that_cannot_continue_ends_with_the_apis_error(api: Api) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a'}}
    cut = chunks(CHAT_PATH, [{"role": "assistant", "content": ""}, {"tool_calls": [call]}], None)
    outcome, found = relayed(api, ASKED[api.path] | TOOLS[api.path], [HELD], [cut])
    assert outcome.error is not None
    [error] = [event for event in found if event["type"] == "error"]
    assert "a vLLM request with tools cannot continue after its engine failed" in json.dumps(error)
    assert "".join(_texts(found)) == '{"a'
    assert found[-1]["type"] in ("response.failed", "error")


def _texts(found: list[Json]) -> list[str]:
    """The texts of all deltas."""
    deltas = [event["delta"] for event in found if event["type"].endswith((".delta", "block_delta"))]
    return [one if isinstance(one, str) else one.get("text", one.get("partial_json")) for one in deltas]
