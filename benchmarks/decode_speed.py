"""Decode speed of pdctl and of transformers, with the same weights, one thread, in one run.

    python benchmarks/decode_speed.py [--model gemma-3-270m|tiny-qwen3] [--tokens 48] [--rounds 3]

Three methods are compared in alternating rounds, each in its own process: `generate` with one prompt at a time,
`generate_batch` (transformers' continuous batching) with 12 prompts, and a pdctl hybrid engine over HTTP with one
stream and with 12.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from pdctl.engine.samples.prepare import prepare, show_progress
from pdctl.host.models import locate_model
from pdctl.host.users import cache_root
from tests.e2e.parity import prompts
from tests.service import Run, Service, running, topology

CONCURRENT = 12

_TRANSFORMERS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging
logging.disable_progress_bar(); logging.set_verbosity_error()
torch.set_num_threads(1)
path, tokens, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
prompts = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
def serial(prompts):
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        outputs.append(out[0, len(prompt):].tolist())
    return outputs
def batch(prompts):
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    return [r.generated_tokens for r in found.values()]
run = serial if how == "serial" else batch
with torch.inference_mode():
    run(prompts[:1])
    started, cpu = time.perf_counter(), time.process_time()
    outputs = run(prompts)
print(json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "outputs": outputs}))
"""


def transformers(path: Path, wanted: list[list[int]], tokens: int, how: str) -> dict[str, object]:
    """Seconds and outputs of transformers."""
    done = subprocess.run(
        ["taskset", "-c", "0", sys.executable, "-c", _TRANSFORMERS, str(path), str(tokens), how],
        input=json.dumps(wanted), text=True, capture_output=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ours(service: Service, wanted: list[list[int]], tokens: int, at_once: int) -> tuple[float, list[list[int]]]:
    """Seconds and outputs over HTTP, streamed."""

    def ask(prompt: list[int]) -> list[int]:
        return list(service.stream(prompt, max_tokens=tokens, ignore_eos=True)["token_ids"])

    ask(wanted[0])
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        outputs = list(threads.map(ask, wanted))
    return time.perf_counter() - started, outputs


def main() -> None:
    """Print tokens per second and the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    located = locate_model(f"sample:{options.model}", cache_root())
    path = Path(prepare(located.spec, located.path, show_progress))
    wanted = prompts(path, (32,) * CONCURRENT)
    few = wanted[:3]
    rows: dict[str, list[float]] = {}
    outputs: dict[str, object] = {}
    # The hybrid engine and every transformers process run on CPU 0 only; the client and the proxy run elsewhere.
    text = topology(f"sample:{options.model}", 0, 0, 1, engine_extra="cpus = [0]", extra="cpus = [1]")
    for _ in range(options.rounds):
        for name, how, some in (("generate, 1 at a time", "serial", few), ("generate_batch, 12", "batch", wanted)):
            found = transformers(path, some, options.tokens, how)
            if "error" in found:
                print(f"{name}: {found['error']}")
                continue
            rows.setdefault(name, []).append(len(some) * options.tokens / float(str(found["seconds"])))
            outputs[name] = found["outputs"]
        run = Run(Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp")))
        with running(run, text) as service:
            for name, some, at_once in (("pdctl, 1 stream", few, 1), ("pdctl, 12 streams", wanted, CONCURRENT)):
                seconds, got = ours(service, some, options.tokens, at_once)
                rows.setdefault(name, []).append(len(some) * options.tokens / seconds)
                outputs[name] = got
    report(rows, outputs, options.model)


def report(rows: dict[str, list[float]], outputs: dict[str, object], model: str) -> None:
    """The table and the ratios of the medians."""
    median = {name: statistics.median(values) for name, values in rows.items()}
    print(f"\n{model}, output tokens/s, median (min-max) of {len(next(iter(rows.values())))} rounds")
    for name, values in rows.items():
        print(f"  {name:24s} {median[name]:8.1f}  ({min(values):.1f}-{max(values):.1f})")
    serial = median["generate, 1 at a time"]
    print(f"  1 stream / generate:              {median['pdctl, 1 stream'] / serial:.2f}")
    print(f"  12 streams / generate:            {median['pdctl, 12 streams'] / serial:.2f}")
    print(f"  12 streams / our 1 stream:        {median['pdctl, 12 streams'] / median['pdctl, 1 stream']:.2f}")
    if "generate_batch, 12" in median:
        print(f"  12 streams / generate_batch:      {median['pdctl, 12 streams'] / median['generate_batch, 12']:.2f}")
    same = outputs["pdctl, 1 stream"] == outputs["generate, 1 at a time"]
    print(f"  outputs equal to generate's:      {same}")


if __name__ == "__main__":
    main()
