"""pdctl's proxy, vllm-router, sglang-router and LMDeploy's proxy with the same mock workers and core, in turn.

    python -m benchmarks.proxy [--rounds 3] [--only pdctl,vllm-router] [--cases ...]

The proxy has CPU 0 to itself; workers and clients share CPU 1. Results are medians over rounds; ratios compare
medians. CPU is the proxy's CPU time, per request or per thousand chunks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

from benchmarks.proxy.peers import DECODE, PEERS, PREFILL, Proxy, pinned

# name: (clients, requests, stream, ms between chunks)
CASES = {
    "whole c1": (1, 400, False, 0),
    "whole c64": (64, 6000, False, 0),
    "whole c512": (512, 6000, False, 0),
    "burst c1": (1, 200, True, 0),
    "burst c64": (64, 2000, True, 0),
    "burst c512": (512, 2000, True, 0),
    "paced c64": (64, 1024, True, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PEERS))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pdctl-bench-proxy"))
    found = parser.parse_args()
    found.folder.mkdir(parents=True, exist_ok=True)
    names, cases = found.only.split(","), found.cases.split(",")
    with ExitStack() as stack:
        for port in (PREFILL, DECODE):
            argv = pinned(1, sys.executable, "-m", "benchmarks.proxy.mock", "--port", port)
            child = subprocess.Popen(argv)
            stack.callback(child.kill)
        await_mocks()
        proxies = [stack.enter_context(PEERS[name](0, found.folder)) for name in names]
        results: dict[str, dict[str, list[dict[str, float]]]] = {
            case: {proxy.name: [] for proxy in proxies} for case in cases
        }
        for case in cases:
            for number in range(found.rounds):
                for proxy in proxies if number % 2 else proxies[::-1]:
                    results[case][proxy.name].append(measure(proxy, case))
            show(case, results[case])
        if "whole c1" in cases:
            direct = [load(DECODE, 1, 400, False)["p50"] + load(PREFILL, 1, 400, False)["p50"] for _ in range(3)]
            print(f"two direct calls at concurrency 1: p50 {statistics.median(direct):.3f} ms")
        for proxy in proxies:
            print(f"{proxy.name}: {proxy.rss_mb():.0f} MB resident at the end")


def await_mocks() -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            for port in (PREFILL, DECODE):
                httpx.get(f"http://127.0.0.1:{port}/mock/stats", trust_env=False)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the mock workers do not start")


def load(port: int, clients: int, requests: int, stream: bool) -> dict[str, float]:
    argv = pinned(1, sys.executable, "-m", "benchmarks.proxy.load", "--port", port, "--clients", clients,
                  "--requests", requests, *(["--stream"] if stream else []))  # fmt: skip
    return dict(json.loads(subprocess.run(argv, capture_output=True, check=True, text=True).stdout))


def measure(proxy: Proxy, case: str) -> dict[str, float]:
    clients, requests, stream, pace_ms = CASES[case]
    httpx.post(f"http://127.0.0.1:{DECODE}/mock/pace", json={"ms": pace_ms}, trust_env=False)
    load(proxy.port, clients, max(clients, requests // 10), stream)
    before = proxy.cpu_s()
    found = load(proxy.port, clients, requests, stream)
    cpu = proxy.cpu_s() - before
    found["cpu_request"] = cpu / max(1, found["requests"]) * 1000
    found["cpu_chunks"] = cpu / max(1, found["chunks"]) * 1e6 if stream else 0.0
    return found


COLUMNS = {
    "rps": "req/s", "chunks_s": "chunks/s", "cpu_request": "CPU ms/req", "cpu_chunks": "CPU ms/1k chunks",
    "p50": "p50 ms", "p99": "p99 ms", "ttft_p50": "TTFT p50", "ttft_p99": "TTFT p99", "gap_p99": "gap p99",
}  # fmt: skip


def show(case: str, by_proxy: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{case}")
    print(f"  {'':14}" + "".join(f"{title:>17}" for title in COLUMNS.values()) + "   errors short")
    medians = {}
    for name, rows in by_proxy.items():
        medians[name] = {key: statistics.median(row[key] or 0 for row in rows) for key in COLUMNS}
        wrong = f"{sum(row['errors'] for row in rows):>9} {sum(row['short'] for row in rows):>5}"
        print(f"  {name:14}" + "".join(f"{medians[name][key]:>17.3f}" for key in COLUMNS) + wrong)
    ours = medians.get("pdctl")
    for name, theirs in medians.items():
        if ours is not None and name != "pdctl":
            ratios = {title: ours[key] / theirs[key] for key, title in COLUMNS.items() if theirs[key]}
            print(f"  ours/{name}: " + "  ".join(f"{title} {ratio:.2f}" for title, ratio in ratios.items()))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
