"""Greedy output of pdctl compared with transformers' `generate` on the same weights, token for token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.service import REPOSITORY, Service

# The engines' number type in comparisons: that of the reference. `auto` is bfloat16 on some CPUs.
FLOAT32 = 'dtype = "float32"'
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 129, 200, 257, 400, 511, 600, 900, 1200, 1500)

_REFERENCE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
torch.set_num_threads(1)
path, tokens = sys.argv[1], int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
for prompt in json.load(sys.stdin):
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                             pad_token_id=0)
        new = out[0, len(prompt):]
        logits = model(out[:, :-1]).logits[0, len(prompt) - 1:]
        best = logits.topk(2, -1).values
    print(json.dumps({"ids": new.tolist(), "margin": float((best[:, 0] - best[:, 1]).min())}), flush=True)
"""


def prompts(model_path: Path, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Prompts of exactly these lengths, from different places of a real text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    text = (REPOSITORY / "LICENSE").read_text() * 2
    made = []
    for index, length in enumerate(lengths):
        ids = tokenizer.encode(text[index * 211 :]).ids
        assert len(ids) >= length
        made.append(ids[:length])
    return made


def reference(model_path: Path, wanted: list[list[int]], tokens: int) -> list[list[int]]:
    """The output of `generate`, computed in a separate process, once per model and prompt."""
    done = subprocess.run(
        [sys.executable, "-c", _REFERENCE, str(model_path), str(tokens)],
        input=json.dumps(wanted),
        text=True,
        capture_output=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(wanted)
    return [row["ids"] for row in rows]


def compare(service: Service, wanted: list[list[int]], expected: list[list[int]], tokens: int) -> None:
    """Streamed and not, alone and eight at once. Raises AssertionError at the first difference."""

    def whole(prompt: list[int]) -> list[int]:
        return list(service.complete(prompt, max_tokens=tokens)["token_ids"])

    def streamed(prompt: list[int]) -> list[int]:
        return list(service.stream(prompt, max_tokens=tokens)["token_ids"])

    for index, prompt in enumerate(wanted):
        ask = streamed if index % 2 else whole
        assert ask(prompt) == expected[index], f"alone, prompt of {len(prompt)} tokens"
    with ThreadPoolExecutor(8) as threads:
        for name, ask in (("streamed", streamed), ("whole", whole)):
            for prompt, ids, right in zip(wanted, threads.map(ask, wanted), expected, strict=True):
                assert ids == right, f"eight at once, {name}, prompt of {len(prompt)} tokens"


def main() -> int:
    """The full matrix, as a table."""
    import argparse
    import shutil
    import tempfile
    import time

    from pdctl.engine.samples.prepare import prepare, show_progress
    from pdctl.host.models import locate_model
    from pdctl.host.users import cache_root
    from tests.service import Run, running, topology

    parser = argparse.ArgumentParser(prog="scripts/parity")
    parser.add_argument("--model", nargs="*", default=["tiny-qwen3", "gemma-3-270m"])
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    for model in options.model:
        located = locate_model(f"sample:{model}", cache_root())
        path = Path(prepare(located.spec, located.path, show_progress))
        wanted = prompts(path)
        expected = reference(path, wanted, options.tokens)
        distinct = sum(len(set(ids)) for ids in expected) / len(expected)
        print(
            f"{model}: {len(wanted)} prompts, {options.tokens} tokens each, {distinct:.1f} distinct on average",
            flush=True,
        )
        for name, roles in {"1P1D": (1, 1, 0), "1P2D": (1, 2, 0), "2P1D": (2, 1, 0), "1H": (0, 0, 1)}.items():
            run = Run(Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp")))
            started = time.monotonic()
            with running(run, topology(f"sample:{model}", *roles, kv_cache_gb=1.0, engine_extra=FLOAT32)) as service:
                compare(service, wanted, expected, options.tokens)
                service.idle()
            shutil.rmtree(run.folder)
            print(
                f"  {name}: alone, 8 streamed, 8 whole: identical ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
