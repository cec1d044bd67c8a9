"""Streams of clients while engines are killed and frozen under load, each compared with a run without faults.

    python -m benchmarks.failover [--model tiny-qwen3|gemma-3-270m] [--streams 32] [--kills 20] [--router vllm-router]

2 prefill and 2 decode engines with real models. Clients keep `--streams` streams open, half greedy, half seeded. A
decode engine is killed `--kills` times, a prefill engine as often, an engine is frozen 5 times and prefill and decode
are killed together 5 times, each when all engines are back. Exit code 1 if a request failed or a token differed.

With `--router`, the same load goes through vllm-router or sglang-router instead of pdctl's proxy, to the same engines.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.proxy.peers import installed
from pdctl.control_api import MeasuredProcess
from pdctl.host import read_host
from pdctl.host.models import locate_model
from tests.e2e.parity import prompts
from tests.service import Engine, Run, Service, free_port, pid_of, running, topology

FREEZE_S = 6.0


@dataclass
class Observations:
    """The clients' observations."""

    done: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    cut: int = 0
    pauses: list[float] = field(default_factory=list)
    quiet_gaps: list[float] = field(default_factory=list)


@dataclass
class Load:
    """Clients of one address. `expected`: the text of each request in the run without faults."""

    url: str
    headers: dict[str, str]
    requests: list[dict[str, object]]
    expected: list[str] = field(default_factory=list)
    observed: Observations = field(default_factory=Observations)
    faults: list[float] = field(default_factory=list)
    ended: bool = False

    async def quiet_run(self) -> None:
        async with self.client() as client:
            for number in range(len(self.requests)):
                text, reason, _ = await self.stream(client, number)
                assert reason is None, f"the quiet run failed: {reason}"
                self.expected.append(text)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=600, trust_env=False, headers=self.headers)

    async def stream(self, client: httpx.AsyncClient, number: int) -> tuple[str, str | None, list[float]]:
        """The text, the reason if it failed, and the arrival times of its parts."""
        times: list[float] = []
        text, done = "", False
        try:
            async with client.stream("POST", "/v1/completions", json=self.requests[number]) as answer:
                if answer.status_code != 200:
                    return "", f"status {answer.status_code}", []
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        if "error" in event:
                            return text, f"error event: {event['error']['message'][:60]}", times
                        for choice in event["choices"]:
                            text += choice["text"]
                        times.append(time.monotonic())
        except httpx.HTTPError as failure:
            return text, type(failure).__name__, times
        return text, None if done else "cut without [DONE]", times

    async def run(self, streams: int) -> None:
        async with self.client() as client, asyncio.TaskGroup() as tasks:
            for worker in range(streams):
                tasks.create_task(self.worker(client, random.Random(worker)))

    async def worker(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        while not self.ended:
            number = chance.randrange(len(self.requests))
            started = time.monotonic()
            text, reason, times = await self.stream(client, number)
            self.note(number, text, reason, [started, *times])

    def note(self, number: int, text: str, reason: str | None, times: list[float]) -> None:
        observed = self.observed
        if reason is not None:
            observed.failures[reason] += 1
            if reason.startswith("cut") or not reason.startswith("status"):
                observed.cut += 1
            return
        observed.done += 1
        observed.wrong += text != self.expected[number]
        gaps = list(itertools.pairwise(times))
        for fault in self.faults:
            if times[0] < fault < times[-1]:
                # The longest pause that began after the fault or was in progress when it happened.
                observed.pauses.append(max(end - start for start, end in gaps if end > fault))
                return
        observed.quiet_gaps += [end - start for start, end in gaps[1:]]


LENGTHS = (5, 20, 40, 60, 90, 130, 170, 220)


def requests(sample: str, max_tokens: int) -> list[dict[str, object]]:
    found = []
    path = Path(locate_model(f"sample:{sample}", read_host().cache_root).path)
    for number, prompt in enumerate(prompts(path, LENGTHS)):
        common: dict[str, object] = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True,
                                     "model": "m"}  # fmt: skip
        found.append({**common, "temperature": 0})
        found.append({**common, "temperature": 0.8, "top_p": 0.95, "seed": number})
    return found


def kill(process: MeasuredProcess) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(pid_of(process))
        # Sometimes the core, sometimes its front: either ends the other.
        victim = random.choice([leader, *leader.children()])
        victim.send_signal(signal.SIGKILL)


def freeze(process: MeasuredProcess, sign: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(pid_of(process))
        for found in (leader, *leader.children(recursive=True)):
            found.send_signal(sign)


async def faults(service: Service, load: Load, kills: int) -> None:
    schedule = ["decode"] * kills + ["prefill"] * kills + ["freeze"] * 5 + ["pair"] * 5
    random.shuffle(schedule)
    started = time.monotonic()
    for number, fault in enumerate(schedule):
        await asyncio.to_thread(service.healthy)
        await asyncio.sleep(random.uniform(0.2, 2.0))
        by_role = {role: [p for p in service.engines() if p.role == role] for role in ("prefill", "decode")}
        load.faults.append(time.monotonic())
        if fault == "freeze":
            frozen = random.choice(by_role[random.choice(["prefill", "decode"])])
            freeze(frozen, signal.SIGSTOP)
            await asyncio.sleep(FREEZE_S)
            freeze(frozen, signal.SIGCONT)
        else:
            for role in ("prefill", "decode") if fault == "pair" else (fault,):
                kill(random.choice(by_role[role]))
        await asyncio.sleep(0.5)
        failed, at = sum(load.observed.failures.values()), time.monotonic() - started
        print(f"  {number + 1}/{len(schedule)} {fault}: {load.observed.done} done, {failed} failed, "
              f"{load.observed.wrong} wrong, {at:.0f} s", file=sys.stderr)  # fmt: skip
    await asyncio.to_thread(service.healthy)
    load.ended = True


@contextlib.contextmanager
def router(name: str, service: Service, folder: Path, secret: str) -> Iterator[str]:
    """Another router for the same engines; it gets their secret as an API key."""
    bin_ = installed(folder / name, f"{name}=={'0.1.17' if name == 'vllm-router' else '0.3.2'}")
    port = free_port()
    urls = {role: [f"http://127.0.0.1:{p.ports['http']}" for p in service.engines() if p.role == role]
            for role in ("prefill", "decode")}  # fmt: skip
    argv = [str(bin_ / "vllm-router"), "--vllm-pd-disaggregation"]
    for role, found in urls.items():
        for url in found:
            argv += [f"--{role}", url]
    argv += ["--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port), "--prometheus-port",
             str(free_port()), "--log-level", "warning"]  # fmt: skip
    with (folder / f"{name}.log").open("w") as log:
        env = {**os.environ, "OPENAI_API_KEY": secret}
        child = subprocess.Popen(argv, stdout=log, stderr=log, env=env)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.kill()
        child.wait()


def report(load: Load, seconds: float) -> int:
    observed = load.observed
    failed = sum(observed.failures.values())
    print(
        f"{len(load.faults)} faults in {seconds:.0f} s; {observed.done + failed} streams: "
        f"{observed.done} done, {failed} failed"
    )
    print(f"  failed: {dict(observed.failures)}; of them cut in mid-stream: {observed.cut}")
    print(f"  wrong tokens in {observed.wrong}")
    for name, values in (
        ("gap between tokens, quiet", observed.quiet_gaps),
        ("pause of a stream that met a fault", observed.pauses),
    ):
        if values:
            ordered = sorted(values)
            p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
            worst = f"p99 {p99:.3f} s, worst {ordered[-1]:.3f} s ({len(ordered)})"
            print(f"  {name}: p50 {statistics.median(ordered):.3f} s, {worst}")
    return 1 if failed or observed.wrong else 0


async def measure(service: Service, url: str, headers: dict[str, str], found: argparse.Namespace) -> int:
    load = Load(url, headers, requests(found.model, found.tokens))
    quiet = Load(service.url, {}, load.requests)
    await quiet.quiet_run()
    load.expected = quiet.expected
    started = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run(found.streams))
        tasks.create_task(faults(service, load, found.kills))
    code = report(load, time.monotonic() - started)
    if not found.router:
        service.idle()
        print("  afterwards: every block free, no lease held")
        metrics = service.client.get("/metrics").text
        print("  " + "; ".join(line for line in metrics.splitlines() if line.startswith("pdctl_proxy_failovers_total")))
    return code


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-qwen3")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--router", choices=["vllm-router"], default=None)
    found = parser.parse_args()
    random.seed(found.seed)
    text = topology(f"sample:{found.model}", prefills=2, decodes=2, kv_cache_gb=0.5)
    text = text.replace("[supervisor]", "[supervisor]\nmax_restarts = 1000\nwithin_s = 1")
    with tempfile.TemporaryDirectory(prefix="pf") as folder, running(Run(Path(folder), poison=False), text) as service:
        if not found.router:
            return asyncio.run(measure(service, service.url, {}, found))
        secret = Engine(service, "prefill-0").http.headers["authorization"].removeprefix("Bearer ")
        peers = Path("/tmp/pdctl-bench-proxy")
        peers.mkdir(exist_ok=True)
        with router(found.router, service, peers, secret) as url:
            return asyncio.run(measure(service, url, {}, found))


if __name__ == "__main__":
    sys.exit(main())
