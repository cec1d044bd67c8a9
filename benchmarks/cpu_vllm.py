"""This engine's CPU speed against vLLM's, on the same weights: tokens per second of process CPU time, one thread each.

    python -m benchmarks.cpu_vllm --python /path/to/vllm/venv/bin/python [--model gemma-3-270m] [--rounds 2] [--compile]

Both compute in turns, each in a process of its own pinned to one CPU: prompts of 128, 512 and 1,500 tokens (the fastest
of three), decode steps of 1, 8 and 32 sequences with 128 tokens of context (the fastest of 12), and 64 requests at once
(prompts of 64 to 512 tokens, answers of 16 to 64; all tokens, prompts included, divided by all CPU time). vLLM runs in
one process, without prefix caching; with `--compile` through torch.compile, else eagerly. Prints a table and one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from pdctl.host.models import locate_model
from pdctl.host.users import cache_root

_LONGEST_S = 900


def main() -> int:
    """Prints the table on stderr and one JSON line on stdout."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_vllm")
    parser.add_argument("--python", required=True, help="of an environment with vLLM for CPUs")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cpu", default="0")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    options = parser.parse_args()
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for _ in range(options.rounds):
        words = [sys.executable, "-m", "benchmarks.cpu_speed", "--model", options.model, "--mix"]
        ours.append(_run(words, options.cpu, {}))
        path = locate_model(f"sample:{options.model}", cache_root()).path
        script = str(Path(__file__).parent / "cpu_vllm_worker.py")
        theirs.append(_run([options.python, script, path, str(int(options.compile))], options.cpu, _VLLM))
    found = {}
    for name in ours[0]:
        mine, other = max(run[name] for run in ours), max(run[name] for run in theirs)
        found[name] = {"pdctl": mine, "vllm": other, "ratio": round(mine / other, 2)}
        sys.stderr.write(f"{name:14} {mine:8.1f} {other:8.1f} {mine / other:6.2f}\n")
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


_VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip


def _run(words: list[str], cpu: str, extra: dict[str, str]) -> dict[str, float]:
    """The numbers on the last line of a worker's output."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": cpu}
    done = subprocess.run(
        ["taskset", "-c", cpu, *words], env={**os.environ, **threads, **extra}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=_LONGEST_S, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        raise SystemExit(1)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
