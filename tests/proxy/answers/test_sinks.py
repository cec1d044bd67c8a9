"""The bytes that clients receive over a real connection, written by uvicorn's own `send` and through middleware."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import cast

import msgspec
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from pdctl.adapters import Choice
from pdctl.net import asgi
from pdctl.net.http_client import ConnectionPool, Response
from pdctl.net.http_protocol import HttpProtocol
from pdctl.net.openai.api import ApiError, Counts
from pdctl.proxy.answers.sinks import StreamAnswer, WholeAnswer
from pdctl.proxy.client.requests import ClientRequest, parse
from pdctl.proxy.telemetry.timing import Timing

HEADERS = [(b"x-request-id", b"r1")]
Json = dict[str, object]
Script = Callable[[StreamAnswer | WholeAnswer], Awaitable[None]]
ways = pytest.mark.parametrize("direct", [True, False], ids=["direct", "through middleware"])


def asked(chat: bool = False, /, **fields: object) -> ClientRequest:
    prompt: Json = {"messages": []} if chat else {"prompt": "x"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return parse(json.dumps({**prompt, **fields}).encode(), path, chat, "r1", "m")


def raw(**fields: object) -> Choice:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}


def text(said: str, reason: str | None = None) -> Choice:
    return raw(text=said, finish_reason=reason)


def delta(reason: str | None = None, **fields: object) -> Choice:
    return raw(delta=fields, finish_reason=reason)


def answered(request: ClientRequest, script: Script, direct: bool = True, timing: Timing | None = None) -> Response:
    """What a client receives from an answer written by `script`."""

    async def app(_: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        async def passed(message: asgi.Message) -> None:
            await send(message)

        kind = StreamAnswer if request.stream else WholeAnswer
        await script(kind(request, send if direct else passed, HEADERS, timing))

    async def main() -> Response:
        config = uvicorn.Config(app, lifespan="off", ws="none", http=HttpProtocol, log_level="warning")
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: HttpProtocol(config, state, {}), "127.0.0.1", 0)
        pool = ConnectionPool("127.0.0.1", server.sockets[0].getsockname()[1])
        try:
            return await pool.request("POST", "/", timeout_s=60.0)
        finally:
            pool.close()
            server.close()
            for connection in tuple(state.connections):
                cast(HttpProtocol, connection).transport.abort()
            await asyncio.gather(*state.tasks)
            await asyncio.sleep(0)  # transports close in the loop's next turn

    return asyncio.run(main())


def events(body: bytes) -> list[Json | str]:
    """The events of a stream; those that are not JSON unchanged."""
    assert body.endswith(b"\n\n"), "a stream ends with a complete event"
    found: list[Json | str] = []
    for event in body.decode().removesuffix("\n\n").split("\n\n"):
        data = event.removeprefix("data: ")
        found.append(json.loads(data) if data.startswith("{") else data)
    return found


def choices(body: bytes) -> list[Json]:
    """The choices of a stream's events, in order."""
    told = [event for event in events(body) if isinstance(event, dict)]
    return [choice for event in told for choice in cast(list[Json], event["choices"])]


@ways
def test_each_choice_of_a_chat_has_its_role_in_its_first_event_only(direct: bool) -> None:
    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        first, second = answer.sinks
        await second.add(delta(content="b"), [1])
        await first.add(delta(content="a"), [2])
        await second.add(delta("stop", content="c"), [3])
        await first.add(delta("stop"), [4])
        await answer.finish([None, None], Counts(3, 4))

    found = answered(asked(True, stream=True, n=2), script, direct)
    assert (found.status, found.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert found.headers["x-request-id"] == "r1"
    assert choices(found.body) == [
        {"index": 1, "delta": {"role": "assistant", "content": "b"}, "finish_reason": None},
        {"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None},
        {"index": 1, "delta": {"content": "c"}, "finish_reason": "stop"},
        {"index": 0, "delta": {}, "finish_reason": "stop"},
    ]
    assert events(found.body)[-1] == "[DONE]"


def test_an_engine_that_names_the_role_is_not_contradicted() -> None:
    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        await answer.sinks[0].add(delta(role="tool", content="a"), [1])
        await answer.finish([None], Counts(1, 1))

    [choice] = choices(answered(asked(True, stream=True), script).body)
    assert choice["delta"] == {"role": "tool", "content": "a"}


@ways
def test_what_was_passed_on_was_the_first_event(direct: bool) -> None:
    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        [sink] = answer.sinks
        assert sink.passes
        head = sink.event_head
        await sink.pass_on(head + b'{"index":0,"delta":{"role":"assistant","content":"a"}}]}\n\n')
        more = head + b'{"index":0,"delta":{"content":"b"}}]}\n\n'
        if not sink.part_now(more, b""):
            assert not direct
            await sink.pass_on(more)
        await sink.add(delta("stop", content="c"), [3])
        await answer.finish([None], Counts(1, 3))

    found = choices(answered(asked(True, stream=True), script, direct).body)
    assert [choice["delta"] for choice in found] == [
        {"role": "assistant", "content": "a"}, {"content": "b"}, {"content": "c"},
    ]  # fmt: skip


@pytest.mark.parametrize("shows", [True, False])
def test_token_ids_are_for_who_asked_for_them(shows: bool) -> None:
    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        [sink] = answer.sinks
        assert (sink.shows_token_ids, sink.hides_token_ids) == (shows, not shows)
        await sink.add(text("a"), [5, 6])
        await answer.finish([None], Counts(1, 2))

    [choice] = choices(answered(asked(stream=True, return_token_ids=shows), script).body)
    assert choice == {"index": 0, "text": "a", "finish_reason": None} | ({"token_ids": [5, 6]} if shows else {})


@pytest.mark.parametrize("wanted", [True, False])
def test_counts_come_last_where_they_were_asked_for(wanted: bool) -> None:
    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        await answer.sinks[0].add(text("a", "stop"), [5])
        await answer.finish([None], Counts(7, 1))

    found = events(answered(asked(stream=True, stream_options={"include_usage": wanted}), script).body)
    assert found[-1] == "[DONE]"
    counts = [event for event in found if isinstance(event, dict) and "usage" in event]
    assert len(counts) == wanted
    if wanted:
        [last] = counts
        assert found[-2] is last
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
        assert last["id"] == "cmpl-r1"


def test_counts_so_far_are_in_every_event_and_are_each_choices_own() -> None:
    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        first, second = answer.sinks
        assert not first.passes
        first.prompt_tokens = second.prompt_tokens = 7
        await first.add(text("a"), [1])
        await first.add(text("b"), [2, 3])
        await second.add(text("c"), [4])
        await answer.finish([None, None], Counts(7, 4))

    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(answered(asked(stream=True, n=2, stream_options=options), script).body)
    counts = [cast(dict[str, int], event["usage"]) for event in found if isinstance(event, dict)]
    assert {count["prompt_tokens"] for count in counts} == {7}
    assert [count["completion_tokens"] for count in counts] == [1, 3, 1, 4]


def test_only_one_stream_of_its_own_counts_passes_events_on() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for request, passes in (
        (asked(stream=True), True),
        (asked(stream=True, n=2), False),
        (asked(stream=True, stream_options=options), False),
    ):

        async def send(_: asgi.Message) -> None:
            raise AssertionError("nothing is sent by asking")

        assert {sink.passes for sink in StreamAnswer(request, send, []).sinks} == {passes}


@ways
def test_a_failure_before_the_first_event_is_an_error_answer(direct: bool) -> None:
    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        assert not answer.started
        await answer.fail(ApiError(503, "no engine is ready", "service_unavailable", retry_after=5))

    for stream in (True, False):
        found = answered(asked(stream=stream), script, direct)
        assert (found.status, found.headers["content-type"]) == (503, "application/json")
        assert (found.headers["retry-after"], found.headers["x-request-id"]) == ("5", "r1")
        assert json.loads(found.body)["error"]["message"] == "no engine is ready"


@ways
def test_a_failure_after_the_first_event_is_the_last_event(direct: bool) -> None:
    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        await answer.sinks[0].add(text("a"), [1])
        assert answer.started
        await answer.fail(ApiError(502, "it failed", "server_error"))

    found = answered(asked(stream=True), script, direct)
    assert found.status == 200
    first, last = events(found.body)
    assert isinstance(first, dict)
    assert isinstance(last, dict)
    assert last["error"] == {"message": "it failed", "type": "server_error", "param": None, "code": 502}


@ways
@pytest.mark.parametrize("stream", [True, False])
def test_timing_is_told_in_the_head_and_what_came_later_in_a_comment(stream: bool, direct: bool) -> None:
    timing = Timing(received_at=10.0, admitted_at=10.5)

    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        await answer.sinks[0].add(text("a", "stop"), [1])
        timing.token(12.0)
        await answer.finish([None], Counts(1, 1))

    found = answered(asked(stream=stream), script, direct, timing)
    whole = "queue;dur=500.000, ttft;dur=2000.000"
    assert found.headers["x-pdctl-timing"] == ("queue;dur=500.000" if stream else whole)
    if stream:
        assert events(found.body)[1:] == [f": x-pdctl-timing {whole}", "[DONE]"]


@ways
def test_an_engines_whole_body_is_the_answer_byte_for_byte(direct: bool) -> None:
    body = b'{"id": "x",  "choices": [{"index":0,"text":"a"}], "usage":{}}'

    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        await answer.finish([body], Counts(9, 9))

    found = answered(asked(), script, direct)
    assert (found.status, found.headers["content-type"], found.body) == (200, "application/json", body)
    assert found.headers["x-request-id"] == "r1"


@ways
@pytest.mark.parametrize("whole_at", [0, 1])
def test_whole_bodies_and_gathered_parts_become_one_answer(whole_at: int, direct: bool) -> None:
    whole = b'{"id":"x","choices":[{"index":0,"text":"whole","finish_reason":"length"}],"usage":{"prompt_tokens":1}}'

    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        sink = answer.sinks[1 - whole_at]
        await sink.add(text("col"), [1])
        await sink.add(text("lected", "stop"), [2])
        await answer.finish([whole, None] if whole_at == 0 else [None, whole], Counts(5, 4))

    found = json.loads(answered(asked(n=2), script, direct).body)
    assert found["choices"][whole_at] == {"index": whole_at, "text": "whole", "finish_reason": "length"}
    assert found["choices"][1 - whole_at] == {"index": 1 - whole_at, "text": "collected", "finish_reason": "stop"}
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert (found["id"], found["object"], found["model"]) == ("cmpl-r1", "text_completion", "m")


@pytest.mark.parametrize(
    ("fields", "takes"),
    [({}, True), ({"return_token_ids": True}, False), ({"prompt_logprobs": 1}, False), ({"logprobs": 2}, True),
     ({"echo": True, "logprobs": 2}, False)],
)  # fmt: skip
def test_a_body_in_one_piece_will_do_where_it_has_all_that_was_asked_for(fields: Json, takes: bool) -> None:
    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        [sink] = answer.sinks
        assert sink.takes_whole == takes
        assert not sink.passes
        assert not sink.part_now(b"x", b"")
        with pytest.raises(AssertionError, match="3 bytes"):
            await sink.pass_on(b"xxx")
        await sink.add(text("a", "stop"), [1])
        await answer.finish([None], Counts(1, 1))

    found = answered(asked(**fields), script)
    assert json.loads(found.body)["choices"][0]["text"] == "a"


def test_an_answer_without_parts_is_an_empty_message() -> None:
    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        await answer.finish([None], Counts(1, 0))

    [choice] = json.loads(answered(asked(True), script).body)["choices"]
    assert choice == {"index": 0, "message": {"role": "assistant", "content": ""}}


PARTS = st.tuples(st.integers(0, 2), st.text(max_size=5), st.lists(st.integers(0, 99), max_size=3))


@given(st.lists(PARTS, max_size=20), st.booleans(), st.booleans())
def test_a_stream_put_together_is_the_whole_answer(
    parts: list[tuple[int, str, list[int]]], chat: bool, ids: bool
) -> None:
    async def write(stream: bool) -> bytes:
        sent: list[bytes] = []

        async def send(message: asgi.Message) -> None:
            sent.append(message.get("body", b""))

        request = asked(chat, stream=stream, n=3, return_token_ids=ids)
        answer = (StreamAnswer if stream else WholeAnswer)(request, send, [])
        for index, said, tokens in parts:
            await answer.sinks[index].add(delta(content=said) if chat else text(said), tokens)
        for sink in answer.sinks:
            await sink.add(delta("stop") if chat else text("", "stop"), [])
        await answer.finish([None] * 3, Counts(1, 1))
        return b"".join(sent)

    streamed = choices(asyncio.run(write(stream=True)))
    for choice in json.loads(asyncio.run(write(stream=False)))["choices"]:
        mine = [part for part in streamed if part["index"] == choice["index"]]
        if chat:
            deltas = [cast(dict[str, str], part["delta"]) for part in mine]
            assert [part.get("role") for part in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
            said = "".join(part.get("content", "") for part in deltas)
        else:
            said = "".join(cast(str, part["text"]) for part in mine)
        assert said == (choice["message"]["content"] if chat else choice["text"])
        assert [part["finish_reason"] for part in mine][-1] == choice["finish_reason"] == "stop"
        if ids:
            assert [token for part in mine for token in cast(list[int], part["token_ids"])] == choice["token_ids"]


@ways
def test_notes_are_made_for_a_journal_only(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost more than the rest of a part."""
    monkeypatch.setattr("pdctl.proxy.answers.sinks.noted", None)

    async def script(answer: StreamAnswer | WholeAnswer) -> None:
        assert isinstance(answer, StreamAnswer)
        assert not answer.writer.has_journal
        await answer.sinks[0].add(text("a", "stop"), [1])
        await answer.finish([None], Counts(3, 1))

    assert [choice["text"] for choice in choices(answered(asked(stream=True), script, direct).body)] == ["a"]
