"""vLLM's part of `benchmarks.cpu_vllm`: runs in vLLM's environment and prints one JSON line. Arguments: model, 0 or 1."""

from __future__ import annotations

import json
import random
import sys
import time

from vllm import LLM, SamplingParams, TokensPrompt

_CONTEXT, _STEPS, _ROUNDS = 128, 12, 3


def main() -> None:
    model, compiled = sys.argv[1], sys.argv[2] == "1"
    llm = LLM(
        model, dtype="float32", max_model_len=2048, max_num_seqs=64, max_num_batched_tokens=2048,
        enable_prefix_caching=False, enforce_eager=not compiled,
    )  # fmt: skip
    rng = random.Random(3)
    found: dict[str, float] = {}

    def ids(length: int) -> list[int]:
        return [rng.randrange(5, 200_000) for _ in range(length)]

    def add(name: str, length: int, tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=ids(length)), sampling)

    def step() -> float:
        began = time.process_time()
        llm.llm_engine.step()
        return time.process_time() - began

    def drain() -> float:
        seconds = 0.0
        while llm.llm_engine.has_unfinished_requests():
            seconds += step()
        return seconds

    for length in (128, 512, 1500):
        times = []
        for number in range(_ROUNDS):
            add(f"p{length}-{number}", length, 1)
            times.append(drain())
        found[f"prefill {length}"] = round(length / min(times))
    for batch in (1, 8, 32):
        for number in range(batch):
            add(f"d{batch}-{number}", _CONTEXT, 2 * _STEPS + 8)
        # The prompts take a few steps; the fastest ones are those that only decode.
        times = [step() for _ in range(2 * _STEPS)]
        found[f"decode {batch}"] = round(batch / min(times[-_STEPS:]), 1)
        drain()
    mix = random.Random(7)
    shapes = [(mix.randint(64, 512), mix.randint(16, 64)) for _ in range(64)]
    for number, (length, tokens) in enumerate(shapes):
        add(f"m{number}", length, tokens)
    found["mix of 64"] = round(sum(map(sum, shapes)) / drain(), 1)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
