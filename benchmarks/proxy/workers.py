"""Whether several proxy processes route as well as one: four decode engines, two of them three times slower.

    python -m benchmarks.proxy.workers [--rounds 3]

`routing = "min_expected_latency"`; each worker sees only its own requests and what the others publish. Clients open a
connection for each request, so that the kernel spreads them over the workers. Prints requests/s, latency and the
share of requests that each decode engine got, for 1 and for 4 workers, in alternation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import uvloop

from benchmarks.proxy.peers import PREFILL, await_port, pdctl, pinned

# Port of each decode engine, and the pause between its chunks, ms.
DECODES = {19211: 2, 19212: 2, 19213: 6, 19214: 6}
CLIENTS, REQUESTS = 12, 300
BODY = json.dumps({"model": "mock", "prompt": "x" * 200, "max_tokens": 64, "stream": True}).encode()


async def one(port: int) -> float:
    """Seconds of a whole stream, on its own connection."""
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(BODY)}\r\n\r\n".encode() + BODY)
    answer = await reader.read(-1)
    writer.close()
    assert b"[DONE]" in answer, answer[:300]
    return time.monotonic() - started


async def load(port: int) -> list[float]:
    left, took = iter(range(REQUESTS)), []

    async def client() -> None:
        for _ in left:
            took.append(await one(port))

    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        for _ in range(CLIENTS):
            tasks.create_task(client())
    return took


def counts() -> list[int]:
    answers = [httpx.get(f"http://127.0.0.1:{port}/mock/stats", trust_env=False).json() for port in DECODES]
    return [answer["streams"] for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pdctl-bench-proxy"))
    found = parser.parse_args()
    with ExitStack() as stack:
        for port in (PREFILL, *DECODES):
            child = subprocess.Popen(pinned(1, sys.executable, "-m", "benchmarks.proxy.mock", "--port", port))
            stack.callback(child.wait)
            stack.callback(child.kill)
        for port, pace in DECODES.items():
            await_port(port)
            httpx.post(f"http://127.0.0.1:{port}/mock/pace", json={"ms": pace}, trust_env=False)
        rows: dict[int, list[tuple[float, float, float, list[float]]]] = {1: [], 4: []}
        for _ in range(found.rounds):
            for workers in rows:
                more = f'routing = "min_expected_latency"\nworkers = {workers}'
                with pdctl(0, found.folder, tuple(DECODES), more, cpus=(0, 1)) as proxy:
                    uvloop.run(load(proxy.port))
                    before, started = counts(), time.monotonic()
                    took = sorted(uvloop.run(load(proxy.port)))
                    seconds = time.monotonic() - started
                    parts = [(b - a) / REQUESTS for a, b in zip(before, counts(), strict=True)]
                    p50, p99 = took[len(took) // 2], took[int(0.99 * len(took))]
                    rows[workers].append((REQUESTS / seconds, p50, p99, parts))
        for workers, each in rows.items():
            rate = statistics.median(row[0] for row in each)
            p50 = statistics.median(row[1] for row in each)
            p99 = statistics.median(row[2] for row in each)
            shares = [statistics.median(row[3][n] for row in each) for n in range(len(DECODES))]
            print(f"{workers} workers: {rate:.0f} requests/s, p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms; "
                  f"shares of the fast and slow decodes {' '.join(f'{share:.2f}' for share in shares)}")  # fmt: skip


if __name__ == "__main__":
    main()
