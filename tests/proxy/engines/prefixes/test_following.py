"""How a proxy asks an engine what it has, over real sockets: an answer that is of no use is a reason to pause."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest

from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.prefixes.asking import ask
from pdctl.proxy.engines.prefixes.following import follow_forever
from pdctl.proxy_wire import EngineAddress
from pdctl.wire import BlocksCall, BlocksReply

GOOD = BlocksReply("e", 4, True, [1, 2], [])
LATER = BlocksReply("e", 5, False, [3], [1])


class Front:
    """Answers in turn, then never again. `calls`: what it was asked."""

    def __init__(self, *answers: bytes | BlocksReply) -> None:
        self.calls: list[BlocksCall] = []
        self._answers = list(answers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-l"))
                self.calls.append(msgspec.json.decode(await reader.readexactly(length), type=BlocksCall))
                if not self._answers:
                    await reader.read()
                    return
                answer = self._answers.pop(0)
                body = msgspec.json.encode(answer) if isinstance(answer, BlocksReply) else b"{}"
                line = b"200 X" if isinstance(answer, BlocksReply) else answer
                writer.write(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (line, len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def followed(front: Front, calls: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, int]:
    """The engine after so many calls, and how often there was a pause."""
    pauses = 0

    async def paused(seconds: float) -> None:
        nonlocal pauses
        pauses += 1
        await real_sleep(0)

    async def run() -> Engine:
        async with await asyncio.start_server(front.serve, "127.0.0.1", 0) as server, asyncio.timeout(60):
            port = server.sockets[0].getsockname()[1]
            engine = Engine.of(EngineAddress("p0", "prefill", "builtin", "127.0.0.1", port), "s")
            engine.healthy = True
            task = asyncio.ensure_future(follow_forever(engine, ask, lambda: True))
            while len(front.calls) < calls:
                await real_sleep(0)
            told = engine.prefixes.told
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            engine.client.close()
            assert engine.prefixes.told == told
            return engine

    real_sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", paused)
    return asyncio.run(run()), pauses


def test_changes_are_asked_for_at_once_and_each_after_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    front = Front(GOOD, LATER)
    engine, pauses = followed(front, 3, monkeypatch)
    assert [(call.epoch, call.after) for call in front.calls] == [("", 0), ("e", 4), ("e", 5)]
    assert (engine.prefixes.told, pauses) == (2, 0)


OTHER = BlocksReply("f", 9, False, [7], [])


@pytest.mark.parametrize("answer", [b"404 X", b"200 X", OTHER], ids=["404", "junk", "other"])
def test_an_answer_that_is_of_no_use_is_followed_by_a_pause(
    answer: bytes | BlocksReply, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = Front(GOOD, answer, answer, GOOD)
    engine, pauses = followed(front, 5, monkeypatch)
    assert [(call.epoch, call.after) for call in front.calls] == [("", 0), ("e", 4), ("", 0), ("", 0), ("e", 4)]
    assert (engine.prefixes.told, pauses) == (2, 2)
