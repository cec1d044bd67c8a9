"""A closed loop of clients: each sends its next request when its last one is answered.

    python -m benchmarks.proxy.load --port P --clients 64 --requests 2000 [--stream]

Prints one JSON line: requests and chunks per second, latency and time to first chunk (ms), gaps between chunks, errors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import cast

import uvloop


@dataclass
class Score:
    latency: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    chunks: int = 0
    errors: int = 0
    short: int = 0


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, request: bytes, expect: int, score: Score, finished: asyncio.Event, left: list[int]) -> None:
        self.request, self.expect, self.score, self.finished, self.left = request, expect, score, finished, left
        self.missing: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.next()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.active:
            self.score.errors += 1
            self.stop()

    def next(self) -> None:
        self.active = self.left[0] > 0
        if not self.active:
            self.stop()
            return
        self.left[0] -= 1
        self.head, self.missing, self.received, self.last, self.tail = b"", None, 0, 0.0, b""
        self.started = time.perf_counter()
        self.transport.write(self.request)

    def stop(self) -> None:
        self.active = False
        self.left[1] -= 1
        if not self.left[1]:
            self.finished.set()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.missing is None:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            data, self.head = self.head[end + 4 :], self.head[:end].lower()
            at = self.head.find(b"content-length:")
            self.missing = int(self.head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else -1
            if not data:
                return
        if not self.last:
            self.score.first.append(now - self.started)
        elif len(self.score.gaps) < 1_000_000:
            self.score.gaps.append(now - self.last)
        self.last = now
        self.received += data.count(b'"text":')
        if self.missing >= 0:
            self.missing -= len(data)
            done = self.missing <= 0
        else:
            self.tail = (self.tail + data)[-5:]
            done = self.tail == b"0\r\n\r\n"
        if done:
            self.done(now)

    def done(self, now: float) -> None:
        score = self.score
        if not self.head.startswith(b"http/1.1 200"):
            score.errors += 1
        else:
            score.latency.append(now - self.started)
            score.chunks += self.received
            score.short += self.received < self.expect
        self.next()


def percentile(values: list[float], part: float) -> float | None:
    ordered = sorted(values)
    return round(1e3 * ordered[min(len(ordered) - 1, int(part * len(ordered)))], 3) if ordered else None


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--chunks", type=int, default=64)
    found = parser.parse_args()
    body = {"model": "mock", "prompt": "the quick brown fox " * 25, "max_tokens": found.chunks, "stream": found.stream,
            "temperature": 0}  # fmt: skip
    data = json.dumps(body, separators=(",", ":")).encode()
    request = (
        f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{found.port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    ).encode() + data
    score, finished, left = Score(), asyncio.Event(), [found.requests, found.clients]
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    expect = found.chunks if found.stream else 1
    await asyncio.gather(
        *(
            loop.create_connection(lambda: Client(request, expect, score, finished, left), "127.0.0.1", found.port)
            for _ in range(found.clients)
        )
    )
    async with asyncio.timeout(300):
        await finished.wait()
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "seconds": round(seconds, 3),
                "requests": len(score.latency),
                "rps": round(len(score.latency) / seconds, 1),
                "chunks": score.chunks,
                "chunks_s": round(score.chunks / seconds),
                "p50": percentile(score.latency, 0.5),
                "p99": percentile(score.latency, 0.99),
                "ttft_p50": percentile(score.first, 0.5),
                "ttft_p99": percentile(score.first, 0.99),
                "gap_p50": percentile(score.gaps, 0.5),
                "gap_p99": percentile(score.gaps, 0.99),
                "errors": score.errors,
                "short": score.short,
            }
        )
    )


if __name__ == "__main__":
    uvloop.run(main())
