"""vLLM's part of `benchmarks.cpu_vllm`, in vLLM's environment. Arguments: model, 1 to compile. Prints one JSON line."""

from __future__ import annotations

import json
import random
import sys
import time

from vllm import LLM, SamplingParams, TokensPrompt

_CONTEXT, _STEPS, _ROUNDS = 128, 12, 3


def main() -> None:
    """Prints tokens per CPU second by case."""
    model, compiled = sys.argv[1], sys.argv[2] == "1"
    bench = _Bench(model, compiled)
    found: dict[str, float] = {}
    for length in (128, 512, 1500):
        found[f"prefill {length}"] = round(length / min(bench.prefill(length) for _ in range(_ROUNDS)))
    for batch in (1, 8, 32):
        found[f"decode {batch}"] = round(batch / bench.decode(batch), 1)
    found["mix of 64"] = round(bench.mix(), 1)
    sys.stdout.write(json.dumps(found) + "\n")


class _Bench:
    def __init__(self, model: str, compiled: bool) -> None:
        self._engine = LLM(
            model, dtype="float32", max_model_len=2048, max_num_seqs=64, max_num_batched_tokens=2048,
            enable_prefix_caching=False, enforce_eager=not compiled,
        ).llm_engine  # fmt: skip
        self._rng = random.Random(3)
        self._count = 0

    def prefill(self, length: int) -> float:
        """CPU seconds of a prompt."""
        self._add(length, 1)
        return self._drain()

    def decode(self, batch: int) -> float:
        """CPU seconds of the fastest step. The prompts take a few steps; the last ones only decode."""
        for _ in range(batch):
            self._add(_CONTEXT, 2 * _STEPS + 8)
        seconds = min([self._step() for _ in range(2 * _STEPS)][-_STEPS:])
        self._drain()
        return seconds

    def mix(self) -> float:
        """Tokens per CPU second of 64 requests at once, prompts included."""
        chance = random.Random(7)
        shapes = [(chance.randint(64, 512), chance.randint(16, 64)) for _ in range(64)]
        for length, tokens in shapes:
            self._add(length, tokens)
        return sum(map(sum, shapes)) / self._drain()

    def _add(self, length: int, tokens: int) -> None:
        ids = [self._rng.randrange(5, 200_000) for _ in range(length)]
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._count += 1
        self._engine.add_request(str(self._count), TokensPrompt(prompt_token_ids=ids), sampling)

    def _step(self) -> float:
        began = time.process_time()
        self._engine.step()
        return time.process_time() - began

    def _drain(self) -> float:
        seconds = 0.0
        while self._engine.has_unfinished_requests():
            seconds += self._step()
        return seconds


if __name__ == "__main__":
    main()
