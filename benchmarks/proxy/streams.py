"""The cost of slow open streams in a proxy: memory and CPU with 100 to 2,000 of them.

    python -m benchmarks.proxy.streams [--only pdctl,vllm-router]

Each stream gets a chunk every 2 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import uvloop

from benchmarks.proxy.__main__ import await_mocks
from benchmarks.proxy.peers import DECODE, PEERS, PREFILL, Proxy, pinned

COUNTS = (100, 500, 1000, 2000)
WATCHED_S = 10.0
PACE_MS = 2000


async def opened(port: int, count: int, writers: list[asyncio.StreamWriter]) -> None:
    """Open streams until there are `count`, and wait for the first bytes of each."""
    body = json.dumps({"model": "mock", "prompt": "x", "max_tokens": 64, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        writer.write(head.encode() + body)
        await reader.readuntil(b"data: ")

    while len(writers) < count:
        await asyncio.gather(*(one() for _ in range(min(50, count - len(writers)))))


async def measure(proxy: Proxy) -> None:
    writers: list[asyncio.StreamWriter] = []
    before = proxy.rss_mb()
    print(f"{proxy.name}: {before:.0f} MB before")
    for count in COUNTS:
        await opened(proxy.port, count, writers)
        started, cpu = time.monotonic(), proxy.cpu_s()
        await asyncio.sleep(WATCHED_S)
        used = (proxy.cpu_s() - cpu) / (time.monotonic() - started)
        each = (proxy.rss_mb() - before) * 1024 / count
        print(f"  {count:5d} streams: {proxy.rss_mb():.0f} MB, {each:.1f} KiB each; {used:.1%} of a core, "
              f"{used / count * 1e6 * PACE_MS / 1000:.0f} us a chunk")  # fmt: skip
    for writer in writers:
        writer.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="pdctl,vllm-router")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pdctl-bench-proxy"))
    found = parser.parse_args()
    found.folder.mkdir(parents=True, exist_ok=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    for name in found.only.split(","):
        with ExitStack() as stack:
            for port in (PREFILL, DECODE):
                child = subprocess.Popen(pinned(1, sys.executable, "-m", "benchmarks.proxy.mock", "--port", port))
                stack.callback(child.kill)
            await_mocks()
            proxy = stack.enter_context(PEERS[name](0, found.folder))
            httpx.post(f"http://127.0.0.1:{DECODE}/mock/pace", json={"ms": PACE_MS}, trust_env=False)
            uvloop.run(measure(proxy))


if __name__ == "__main__":
    main()
