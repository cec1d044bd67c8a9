"""Clients over raw sockets: each knows the bytes of a quiet run, and compares every byte of framing and body.

What differs between two runs by nature is left out of a comparison: the time in `created`, the digits of log
probabilities, tokens found in a prefix cache, and how many events one chunk has. The first and the last are checked
within one answer: one `created`, and chunks that are exactly as long as they say."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Requests whose client has nothing yet begin again with each death: under many deaths they take long.
PATIENCE_S = 600.0
STALL_S = 10.0
# Shorter ones are between two steps of the engines.
SHORTEST_GAP_S = 0.1
_CREATED = re.compile(rb'"created":(\d+)')
_LOGPROB = re.compile(rb"-?\d+\.\d+(?:e-?\d+)?")
# An engine that was restarted has an empty prefix cache.
_CACHED = re.compile(rb',"prompt_tokens_details":\{"cached_tokens":\d+\}')
_INDEX = re.compile(rb'"index":(\d+)')


@dataclass(frozen=True)
class Asked:
    """A request that always has the same answer."""

    name: str
    path: str
    body: dict[str, Any]

    @property
    def data(self) -> bytes:
        body = json.dumps(self.body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nhost: x\r\nx-request-id: {self.name}\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Cut(Exception):
    """The connection ended before its answer. `began`: bytes of the answer that had come."""

    def __init__(self, began: int, reason: str) -> None:
        super().__init__(f"{reason} after {began} bytes of the answer")
        self.began = began


class Wrong(Exception):
    """Bytes that no answer has."""


@dataclass
class Answer:
    head: bytes
    body: bytes

    def compared(self, asked: Asked) -> bytes:
        """What must be the same in every run."""
        created = set(_CREATED.findall(self.body))
        if len(created) > 1:
            raise Wrong(f"{asked.name}: several times in one answer: {created}")
        # The last digits of log probabilities depend on what else the engine computes in a step.
        body = _LOGPROB.sub(b"#", _CACHED.sub(b"", _CREATED.sub(b'"created":0', self.body)))
        several = asked.body.get("n", 1) > 1 or (isinstance(asked.body.get("prompt"), list))
        if several and asked.body.get("stream"):
            # The order of events of different choices is not fixed.
            events = body.split(b"\n\n")
            found = [match[1] if (match := _INDEX.search(event)) else b"~" for event in events]
            order = sorted(range(len(events)), key=lambda at: (found[at], at))
            body = b"\n\n".join(events[at] for at in order)
        return body


@dataclass
class Pace:
    """How a client reads: at most `size` bytes, then a pause of `pause_s`; once in the middle it stalls."""

    size: int = 65536
    pause_s: float = 0.0
    stalls: bool = False
    receive_buffer: int = 0


class Gap(NamedTuple):
    """Nothing came on a connection between two moments."""

    begin: float
    end: float


@dataclass
class Tally:
    """What all clients found."""

    answers: int = 0
    cut: int = 0
    wrong: int = 0
    bytes: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    def note(self, what: str) -> None:
        if len(self.said) < 20:
            self.said.append(what)


class Connection:
    """One connection, read at a pace."""

    def __init__(self, address: tuple[str, int], pace: Pace, tally: Tally | None = None) -> None:
        self.pace = pace
        self._address = address
        self._tally = tally
        self._socket = socket.socket()
        if pace.receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, pace.receive_buffer)
        self._socket.setblocking(False)
        self._rest = b""
        self._began = 0
        self._stall_at = 0
        self._read_at = 0.0

    async def __aenter__(self) -> Connection:
        await asyncio.get_running_loop().sock_connect(self._socket, self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, data)
        except OSError as failure:
            raise Cut(0, f"{failure}") from failure

    async def answer(self) -> Answer:
        """The next answer. Raises Cut, Wrong."""
        self._began = len(self._rest)
        self._stall_at = random.randint(500, 20_000) if self.pace.stalls else 0
        self._read_at = 0.0
        head = await self._until(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 OK\r\n"):
            raise Wrong(f"no answer: {head[:80]!r} {self._rest[:200]!r}")
        if b"transfer-encoding: chunked\r\n" in head:
            return Answer(head, await self._chunks())
        found = re.search(rb"content-length: (\d+)\r\n", head)
        if found is None:
            raise Wrong(f"neither chunks nor a length: {head!r}")
        return Answer(head, await self._exactly(int(found[1])))

    async def _chunks(self) -> bytes:
        parts: list[bytes] = []
        while True:
            line = await self._until(b"\r\n")
            if not re.fullmatch(rb"[0-9a-f]+\r\n", line):
                raise Wrong(f"not the length of a chunk: {line[:60]!r}")
            data = await self._exactly(int(line, 16) + 2)
            if not data.endswith(b"\r\n"):
                raise Wrong(f"a chunk is longer than it says: {data[-60:]!r}")
            if len(data) == 2:
                return b"".join(parts)
            parts.append(data[:-2])

    async def _until(self, end: bytes) -> bytes:
        while end not in self._rest:
            await self._read()
        found, _, self._rest = self._rest.partition(end)
        return found + end

    async def _exactly(self, size: int) -> bytes:
        while len(self._rest) < size:
            await self._read()
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    async def _read(self) -> None:
        pace = self.pace
        if self._stall_at and self._began > self._stall_at:
            self._stall_at = 0
            await asyncio.sleep(STALL_S)
        if pace.pause_s:
            await asyncio.sleep(pace.pause_s)
        try:
            async with asyncio.timeout(PATIENCE_S):
                data = await asyncio.get_running_loop().sock_recv(self._socket, pace.size)
        except TimeoutError:
            raise Cut(self._began, f"nothing came for {PATIENCE_S:.0f} s") from None
        except OSError as failure:
            raise Cut(self._began, f"{failure}") from failure
        if not data:
            raise Cut(self._began, "the connection ended")
        now = time.monotonic()
        is_fast = self._tally is not None and not pace.pause_s and not pace.stalls
        if is_fast and self._read_at and now - self._read_at > SHORTEST_GAP_S:
            assert self._tally is not None
            self._tally.gaps.append(Gap(self._read_at, now))
        self._read_at = now
        self._began += len(data)
        self._rest += data

    @property
    def left(self) -> bytes:
        """What came and belongs to no answer."""
        return self._rest


class Clients:
    """Clients of many kinds. `expected`: the quiet run's answers by name."""

    def __init__(self, address: tuple[str, int], requests: dict[str, Asked]) -> None:
        self.address = address
        self.requests = requests
        self.expected: dict[str, bytes] = {}
        self.tally = Tally()
        self.stopping = False

    async def learn(self) -> None:
        """The answers of a quiet run, each twice."""
        for asked in self.requests.values():
            async with Connection(self.address, Pace()) as connection:
                for _ in range(2):
                    await connection.send(asked.data)
                    found = (await connection.answer()).compared(asked)
                    assert self.expected.setdefault(asked.name, found) == found, f"{asked.name} differs in quiet runs"

    def check(self, asked: Asked, answer: Answer) -> None:
        found, expected = answer.compared(asked), self.expected[asked.name]
        self.tally.bytes += len(found)
        if found != expected:
            at = next((at for at, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
            about = f"{len(found)} bytes, expected {len(expected)}; at {at}: {found[max(0, at - 60) : at + 120]!r}"
            raise Wrong(f"{asked.name}: {about}, not {expected[max(0, at - 60) : at + 120]!r}")
        self.tally.answers += 1

    # -- kinds ---------------------------------------------------------------------------------------------

    async def one_by_one(self, names: list[str], pace: Pace) -> None:
        """Several requests on one connection, one after the other."""
        async with Connection(self.address, pace, self.tally) as connection:
            for name in names:
                asked = self.requests[name]
                await connection.send(asked.data)
                self.check(asked, await connection.answer())
                if self.stopping:
                    return
            assert not connection.left

    async def idle(self, names: list[str]) -> None:
        """A connection that is idle for a while between requests."""
        async with Connection(self.address, Pace()) as connection:
            for name in names:
                await asyncio.sleep(random.uniform(0.2, 3.0))
                await connection.send(self.requests[name].data)
                self.check(self.requests[name], await connection.answer())

    async def pipelined(self, names: list[str]) -> None:
        """All requests at once."""
        async with Connection(self.address, Pace()) as connection:
            await connection.send(b"".join(self.requests[name].data for name in names))
            for name in names:
                self.check(self.requests[name], await connection.answer())

    async def half_sent(self, name: str) -> None:
        """A request in pieces, with pauses."""
        data = self.requests[name].data
        cuts = sorted(random.sample(range(1, len(data)), 4))
        async with Connection(self.address, Pace()) as connection:
            for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                await connection.send(data[begin:end])
                await asyncio.sleep(random.uniform(0.0, 1.5))
            self.check(self.requests[name], await connection.answer())

    # -- all together --------------------------------------------------------------------------------------

    def kinds(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Every kind of client, again and again."""
        slow = Pace(size=1500, pause_s=0.01, receive_buffer=4096)
        stalled = Pace(size=4000, stalls=True, receive_buffer=4096)
        while True:
            yield "fast", lambda: self.one_by_one(["stream"], Pace())
            yield "slow", lambda: self.one_by_one(["long"], slow)
            yield "stalled", lambda: self.one_by_one(["long"], stalled)
            yield "keep-alive", lambda: self.one_by_one(["whole", "stream", "gathered", "whole", "choices"], Pace())
            yield "idle", lambda: self.idle(["whole", "whole"])
            yield "pipelined", lambda: self.pipelined(["whole", "stream", "choices", "whole"])
            yield "half-sent", lambda: self.half_sent(random.choice(["whole", "stream"]))
            yield "unstreamed", lambda: self.one_by_one(["gathered", "whole"], Pace())
            yield "choices", lambda: self.one_by_one(["choices"], Pace())
            yield "prompts", lambda: self.one_by_one(["prompts"], Pace())
            if "tools" in self.requests:
                yield "tools", lambda: self.one_by_one(["tools"], Pace())
                yield "chat", lambda: self.one_by_one(["chat"], Pace())

    async def run(self, count: int) -> None:
        """`count` clients at a time, until `stopping`; then each ends what it does."""
        kinds = self.kinds()

        async def one() -> None:
            while not self.stopping:
                name, work = next(kinds)
                await self._tallied(name, work)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(count):
                tasks.create_task(one())

    async def _tallied(self, name: str, work: Callable[[], Any]) -> None:
        tally = self.tally
        try:
            await work()
            tally.kinds[name] = tally.kinds.get(name, 0) + 1
        except Cut as failure:
            tally.cut += 1
            tally.note(f"{time.strftime('%H:%M:%S')} {name}: {failure}")
        except Wrong as failure:
            tally.wrong += 1
            tally.note(f"{time.strftime('%H:%M:%S')} {name}: {failure}")


PROMPT = "The quick brown fox jumps over the lazy dog. " * 4


def completions() -> dict[str, Asked]:
    """Requests of the completions API."""
    common: dict[str, Any] = {"prompt": PROMPT, "temperature": 0.8, "seed": 5, "ignore_eos": True}
    made = {
        "stream": {**common, "max_tokens": 150, "stream": True, "return_token_ids": True},
        "long": {**common, "max_tokens": 400, "stream": True},
        "whole": {**common, "max_tokens": 20},
        "gathered": {**common, "max_tokens": 50, "n": 2},
        "choices": {**common, "max_tokens": 60, "n": 3, "stream": True, "logprobs": 2},
        "prompts": {**common, "prompt": [PROMPT, "hello there", PROMPT + "x"], "max_tokens": 60, "stream": True},
    }
    return {name: Asked(name, "/v1/completions", body) for name, body in made.items()}


def chats(guide: str, tools: list[dict[str, Any]]) -> dict[str, Asked]:
    """Requests of the chat API, one of them with tools."""
    common: dict[str, Any] = {
        "messages": [{"role": "user", "content": PROMPT}], "temperature": 1, "seed": 5, "stream": True,
    }  # fmt: skip
    made = {
        "chat": {**common, "max_tokens": 100, "ignore_eos": True, "logprobs": True},
        "tools": {**common, "max_tokens": 400, "tools": tools, "guided_regex": guide},
    }
    return {name: Asked(name, "/v1/chat/completions", body) for name, body in made.items()}
