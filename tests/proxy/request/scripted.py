"""Engines on real sockets that answer as scripted by the test, and one leg that is relayed over them."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdctl.adapters import Call, Choice, RequestState
from pdctl.net.openai.api import ApiError
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.engines.releases import Releases
from pdctl.proxy.engines.routing import POLICIES
from pdctl.proxy.request.failover import FailoverPolicy
from pdctl.proxy.request.leg import Leg, Shared
from pdctl.proxy.request.quarantine import Quarantine
from pdctl.proxy.request.relay import Relay
from pdctl.proxy.telemetry.metrics import Metrics
from pdctl.proxy.telemetry.timing import Timing
from pdctl.proxy_wire import EngineAddress

LEASE = {"lease_id": "e1.l1", "epoch": "e1"}
STATE = {"blocks_total": 9, "blocks_free": 9, "block_size": 16, "max_num_seqs": 4, "links": []}
FAST = FailoverPolicy(backoff_s=0.0, wait_for_engine_s=5.0)

# A call sent after every clean-up call of a leg. When it has arrived, they all have.
_LAST = Call("/last", b"{}")

# Writes an answer to one generation call; False ends the connection after it.
Act = Callable[[asyncio.StreamWriter], Awaitable[bool]]


def answer(status: int, body: object) -> Act:
    """A complete answer."""

    async def act(writer: asyncio.StreamWriter) -> bool:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(data), data))
        await writer.drain()
        return True

    return act


def held(token: int) -> Act:
    """A prefill's answer: one token, and KV under a lease."""
    choice = {"index": 0, "text": chr(token), "token_ids": [token], "finish_reason": None}
    return answer(200, {"choices": [choice], "usage": {"prompt_tokens": 5}, "kv_transfer_params": LEASE})


def stream(tokens: Iterable[int], ends: bool = True) -> Act:
    """Events for `tokens`. With `ends` false, the connection is cut after them."""

    async def act(writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        ids = list(tokens)
        for at, token in enumerate(ids):
            reason = "length" if ends and at == len(ids) - 1 else None
            choice = {"index": 0, "text": chr(token), "token_ids": [token], "finish_reason": reason}
            data = b"data: %b\n\n" % msgspec.json.encode({"choices": [choice]})
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        if ends:
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        return ends

    return act


async def cut(_: asyncio.StreamWriter) -> bool:
    """No answer at all."""
    return False


def after(event: asyncio.Event, act: Act) -> Act:
    """`act`, once `event` is set."""

    async def waits(writer: asyncio.StreamWriter) -> bool:
        await event.wait()
        return await act(writer)

    return waits


async def half(writer: asyncio.StreamWriter) -> bool:
    """The start of an answer, then the end of its connection. Unlike after `cut`, the HTTP client never retries."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
    await writer.drain()
    return False


async def silence(_: asyncio.StreamWriter) -> bool:
    """No answer. The engine's `left` is set when the proxy has closed the connection."""
    return True


@dataclass
class Scripted:
    """An engine. `acts`: its answers to generation calls, in order; `calls`: path and body of each call it received.

    `observed`: set when a call has arrived, by path; `left`: when the proxy has closed a call that got `silence`.
    """

    name: str
    role: str
    acts: list[Act]
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    observed: defaultdict[str, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))
    left: asyncio.Event = field(default_factory=asyncio.Event)
    connections: set[asyncio.Task[object]] = field(default_factory=set)

    @property
    def generations(self) -> list[dict[str, Any]]:
        return [body for path, body in self.calls if path == "/v1/completions"]

    def bodies_at(self, path: str) -> list[dict[str, Any]]:
        return [body for at, body in self.calls if at == path]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        act: Act | None = None
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split()[1]
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b""
                if path in ("/pdctl/v1/state", "/health"):
                    await answer(200, STATE)(writer)
                    continue
                if path != _LAST.path:
                    self.calls.append((path, msgspec.json.decode(body)))
                self.observed[path].set()
                act = self.acts.pop(0) if path.endswith("/completions") else answer(200, {})
                if not await act(writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            if act is silence:
                self.left.set()
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            writer.close()


class Gathering:
    """A sink that keeps what a client would receive. `began`: the first part has arrived."""

    passes = hides_token_ids = shows_token_ids = False
    event_head = b""
    prompt_tokens = cached_tokens = completion_tokens = reasoning_tokens = 0

    def __init__(self, takes_whole: bool = False) -> None:
        self.takes_whole = takes_whole
        self.began = asyncio.Event()
        self.tokens: list[int] = []
        self.text = ""

    async def add(self, choice: Choice, token_ids: list[int]) -> None:
        self.tokens += token_ids
        self.began.set()
        self.text += msgspec.json.decode(choice.get("text", b'""'), type=str)

    async def pass_on(self, data: bytes, ids: bytes = b"") -> None:
        raise AssertionError(data)

    def start_over(self) -> bool:
        return not self.tokens

    @property
    def part_now(self) -> Callable[[bytes, bytes], bool]:
        return lambda *_: False


@dataclass
class Outcome:
    """The result of one leg."""

    sink: Gathering
    leg: Leg
    shared: Shared
    error: ApiError | None


async def relay(
    *engines: Scripted,
    max_tokens: int = 8,
    policy: FailoverPolicy = FAST,
    leave_when: Awaitable[object] | None = None,
    kind: str = "builtin",
    sink: Gathering | None = None,
    left: Iterable[Scripted] = (),
    prepare: Callable[[EnginePool], None] = lambda _: None,
    lease_s: float = 30.0,
    chat: dict[str, object] | None = None,
) -> Outcome:
    """Relay one leg over these engines. Returns when every clean-up call has arrived. `left`: see Scripted; `prepare`
    gets the pool before the leg starts; `chat`: the fields of a chat to relay instead of a completion."""
    servers = [await asyncio.start_server(engine.serve, "127.0.0.1", 0) for engine in engines]
    addresses = [
        EngineAddress(engine.name, engine.role, kind, "127.0.0.1", server.sockets[0].getsockname()[1], slot=slot)
        for slot, (engine, server) in enumerate(zip(engines, servers, strict=True))
    ]
    pool = EnginePool.of(addresses)
    shared = Shared(pool, POLICIES["round_robin"], Metrics("m", 1.0, 1.0), Releases(), Quarantine(), 1.0, 1.0)
    shared.failover = policy
    shared.lease_s = lease_s
    background: list[asyncio.Task[object]] = [
        asyncio.ensure_future(pool.watch_forever()), asyncio.ensure_future(shared.releases.run_forever()),
        asyncio.ensure_future(shared.unfinished.run_forever()),
    ]  # fmt: skip
    sink, error = sink or Gathering(), None
    leg = Leg(shared, _state(max_tokens, chat), sink, "r1", b"", 5.0, max_tokens, b"x", None, Timing())
    try:
        async with asyncio.timeout(60):
            while not all(engine.healthy for engine in pool.engines):
                await pool.wait_for_change(1.0)
            prepare(pool)
            running = asyncio.ensure_future(Relay(leg).run())
            if leave_when is not None:
                await leave_when
                running.cancel()
            try:
                await running
            except ApiError as failure:
                error = failure
            except asyncio.CancelledError:
                assert leave_when is not None
            for scripted in left:
                await scripted.left.wait()
            for engine, scripted in zip(pool.engines, engines, strict=True):
                shared.releases.put(engine, _LAST)
                await scripted.observed[_LAST.path].wait()
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        pool.close()
        for server in servers:
            server.close()
        connections = [task for engine in engines for task in engine.connections]
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the loop's next turn
    return Outcome(sink, leg, shared, error)


def _state(max_tokens: int, chat: dict[str, object] | None) -> RequestState:
    asked = chat or {"prompt": "hello", "max_tokens": max_tokens}
    fields: dict[str, object] = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in asked.items()}
    return RequestState("/v1/completions" if chat is None else "/v1/chat/completions", chat is not None, fields)


def pair(prefill: list[Act], decode: list[Act]) -> tuple[Scripted, Scripted]:
    return Scripted("p0", "prefill", prefill), Scripted("d0", "decode", decode)
