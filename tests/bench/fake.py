"""A completion server that answers after known delays, so that the client's measurements can be checked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fake:
    """`first_s`: delay until the first event; `gap_s`: between events. `ends`: number of events before a stream is cut
    off; `status`: a status other than 200 is an error; `words`: how tokens begin when a prompt is sent the first time,
    the second time, and so on."""

    first_s: float = 0.05
    gap_s: float = 0.02
    status: int = 200
    ends: int | None = None
    error_at: int | None = None
    tokenizes: bool = True
    usage: bool = True
    words: tuple[str, ...] = ("t",)
    asked: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        sizes = [line.split(":")[1] for line in head.lower().split("\r\n") if line.startswith("content-length")]
        body = json.loads(await reader.readexactly(int(sizes[0]))) if sizes and int(sizes[0]) else {}
        path = head.split()[1]
        if path == "/v1/models":
            return self._whole(writer, 200, {"data": [{"id": "fake"}]})
        if path == "/tokenize":
            tokens = [10 + len(word) for word in body["prompt"].split()]
            return self._whole(writer, 200 if self.tokenizes else 404, {"tokens": tokens})
        self.asked.append(body)
        if self.status != 200:
            return self._whole(writer, self.status, {"error": {"message": "no"}})
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._stream(writer, body)
        finally:
            self.at_once -= 1

    def _whole(self, writer: asyncio.StreamWriter, status: int, value: object) -> bool:
        data = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        return True

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        count = body["max_tokens"]
        word = self.words[sum(asked["prompt"] == body["prompt"] for asked in self.asked) % len(self.words)]
        for number in range(count):
            await asyncio.sleep(self.first_s if number == 0 else self.gap_s)
            if number == self.ends:
                return False
            if number == self.error_at:
                self._event(writer, {"error": {"message": "the engine is gone"}})
                break
            reason = "length" if number == count - 1 else None
            self._event(writer, {"choices": [{"index": 0, "text": f" {word}{number}", "finish_reason": reason}]})
        if self.usage:
            size = len(body["prompt"]) if isinstance(body["prompt"], list) else len(body["prompt"].split())
            self._event(writer, {"choices": [], "usage": {"prompt_tokens": size, "completion_tokens": count}})
        timing = b"queue;dur=1.500, prefill;dur=20.000;desc=p0, ttft;dur=50.000, decode;desc=d1"
        self._chunk(writer, b": x-pdctl-timing %b\n\n" % timing)
        self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return True

    def _event(self, writer: asyncio.StreamWriter, value: object) -> None:
        self._chunk(writer, b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


@asynccontextmanager
async def listening(fake: Fake) -> AsyncIterator[str]:
    """The server's URL."""
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
