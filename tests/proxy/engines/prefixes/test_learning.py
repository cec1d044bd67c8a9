"""How a proxy learns the tokens of prompts: from what it has, else from the engine; never in the way of a request."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest

from pdctl.adapters import RequestState
from pdctl.net.prefixes.beginnings import PIECE_BYTES, Beginning
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.prefixes import learning as module
from pdctl.proxy.engines.prefixes.blocks import names, salt_of
from pdctl.proxy.engines.prefixes.learning import Learner
from pdctl.proxy.engines.prefixes.places import Places
from pdctl.proxy_wire import EngineAddress
from tests.fakes.kv_events import CLEARED, stored

SIZE = 4
TOKENS = list(range(20, 36))
PIECES = (101, 102)
BEGINNING = Beginning(PIECE_BYTES * 2, PIECES)


class Rig:
    """One engine with an API that answers with `answer`, and keeps the bodies of calls."""

    def __init__(self, kind: str, answer: bytes) -> None:
        self.calls: list[dict[str, Any]] = []
        self.places = Places()
        self.answer, self.closed = answer, asyncio.Event()
        # The engine has computed the prompt, without and with a salt.
        plain = stored([b"1", b"2", b"3", b"4"], None, TOKENS, SIZE)
        salted = stored([b"5", b"6", b"7", b"8"], None, TOKENS, SIZE, cache_salt="s")
        self.batches = [msgspec.msgpack.encode([1.0, [plain, salted]])]
        self._kind = kind

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                assert head.startswith(b"POST /tokenize ")
                length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-l"))
                self.calls.append(msgspec.json.decode(await reader.readexactly(length)))
                status = b"200 X" if self.answer else b"500 X"
                writer.write(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(self.answer), self.answer))
        writer.close()
        self.closed.set()

    async def learn(self, *states: RequestState, beginning: Beginning = BEGINNING, has_block: bool = True) -> int:
        """Put these and wait until all are done; how many were learned."""
        async with await asyncio.start_server(self.serve, "127.0.0.1", 0) as server, asyncio.timeout(60):
            port = server.sockets[0].getsockname()[1]
            address = EngineAddress("p0", "prefill", self._kind, "127.0.0.1", port)
            self.engine = Engine.of(address, "s", None, self.places)
            for number, batch in enumerate(self.batches if has_block else []):
                self.engine.prefixes.heard_batch(number, batch, 1.0)
            learner = Learner(self.places, lambda: [self.engine])
            for state in states:
                learner.put(self.engine, beginning, state)
            task = asyncio.create_task(learner.run_forever())
            await learner._waiting.join()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self.engine.client.close()
            if self.calls:
                await self.closed.wait()
            return learner.learned


def state(prompt: object = "the text", prompt_ids: list[int] | None = None, **more: object) -> RequestState:
    fields = {"model": "m", "max_tokens": 9, "prompt": prompt, **more}
    raw: dict[str, object] = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return RequestState("/v1/completions", False, raw, prompt_ids=prompt_ids or [])


def learned(rig: Rig, *states: RequestState, **more: Any) -> int:
    return asyncio.run(rig.learn(*states, **more))


def ends(salt: str = "") -> dict[int, int]:
    chain = list(names(SIZE, TOKENS, (salt_of(salt),)))
    return {101: chain[1], 102: chain[3]}


ANSWER = msgspec.json.encode({"tokens": TOKENS, "count": len(TOKENS), "max_model_len": 99})


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_engine_is_asked_for_the_tokens_of_a_text(kind: str) -> None:
    rig = Rig(kind, ANSWER)
    assert learned(rig, state(add_special_tokens=False)) == 1
    assert rig.calls == [{"model": "m", "prompt": "the text", "add_special_tokens": False}]
    assert dict(rig.places.of(SIZE)) == ends()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_engine_is_asked_for_the_tokens_of_a_chat(kind: str) -> None:
    said: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}
    rig = Rig(kind, ANSWER)
    asked = state(**said, chat_template_kwargs={"a": 1}, temperature=0)
    del asked.fields["prompt"]
    assert learned(rig, asked) == 1
    assert rig.calls == [{"model": "m", **said, "chat_template_kwargs": {"a": 1}}]


def test_a_prompt_with_media_is_not_learned_but_one_that_speaks_of_them_is() -> None:
    rig = Rig("vllm", ANSWER)
    asked, spoken = state(), state()
    shown = {"type": "image_url", "image_url": {"url": "http://x"}}
    for of, part in ((asked, shown), (spoken, 'what is "image_url"?')):
        of.fields["messages"] = msgspec.Raw(msgspec.json.encode([{"role": "user", "content": part}]))
    assert learned(rig, asked) == 0
    assert learned(rig, spoken) == 1
    assert len(rig.calls) == 1


def test_nobody_is_asked_for_tokens_that_are_known() -> None:
    rig = Rig("vllm", b"")
    assert learned(rig, state(prompt_ids=TOKENS, cache_salt="s")) == 1
    assert dict(rig.places.of(SIZE)) == ends("s")
    rig = Rig("vllm", b"")
    assert learned(rig, state(TOKENS)) == 1
    assert (dict(rig.places.of(SIZE)), rig.calls) == (ends(), [])


@pytest.mark.parametrize(
    "answer",
    [b"", b"{}", b'{"tokens":[]}', b'{"tokens":[1,2,3,-1]}', b'{"tokens":[1,2,3,4294967296]}', b'{"tokens":["x"]}'],
)
def test_an_answer_of_no_use_is_none(answer: bytes) -> None:
    rig = Rig("vllm", answer)
    assert learned(rig, state(), state(prompt_ids=TOKENS)) == 1, "the next prompt is learned"
    assert len(rig.calls) == 1


def test_events_may_come_after_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("vllm", b"")
    batches = [msgspec.msgpack.encode([2.0, [CLEARED, stored([b"0"], None, [1] * SIZE, SIZE)]]), *rig.batches]
    rig.batches = batches[:1]

    async def later(_: float) -> None:
        rig.engine.prefixes.heard_batch(1, batches[1], 1.0)

    monkeypatch.setattr(asyncio, "sleep", later)
    assert learned(rig, state(prompt_ids=TOKENS)) == 1
    assert dict(rig.places.of(SIZE)) == ends()


def test_what_is_known_and_there_is_not_learned_again() -> None:
    rig = Rig("vllm", ANSWER)
    assert learned(rig, state(), state()) == 1
    assert len(rig.calls) == 1


def test_prompts_that_nobody_has_time_for_are_dropped() -> None:
    rig = Rig("vllm", b"")
    assert learned(rig, *(state(prompt_ids=TOKENS) for _ in range(99))) <= module._MOST_WAITING
    too_long = Beginning(module._MOST_BYTES + 1, PIECES)
    assert learned(rig, state(), beginning=too_long) == 0
    assert learned(rig, state(), has_block=False) == 0, "an engine without events"
    assert learned(Rig("lmdeploy", ANSWER), state()) == 0, "a kind that cannot be asked"
    assert not rig.calls
