"""Conversations that grow turn by turn: the time to the first token, and the KV moved, with and without shared blocks.

    python -m benchmarks.prefix_cache [--model gemma-3-270m] [--turns 8] [--conversations 3]

One prefill and one decode engine. Each turn of a conversation is asked twice, in turn: under the conversation's own
salt, whose blocks are there, and under a new salt, for which everything is computed and moved. Exit code 1 if the
tokens differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.service import Engine, Run, Service, running, topology

NEW, ANSWER = 60, 40


def moved(service: Service) -> float:
    """Bytes of KV that the decode engine has read."""
    with Engine(service, "decode-0").http as http:
        lines = http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("pdctl_engine_pulled_bytes_total")))


def ask(service: Service, prompt: list[int], salt: str) -> tuple[list[int], float, int]:
    """Token ids, seconds to the first one, and tokens of the prompt that were there."""
    body = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "stream": True, "model": "m",
            "return_token_ids": True, "cache_salt": salt, "stream_options": {"include_usage": True}}  # fmt: skip
    ids: list[int] = []
    first, cached, began = 0.0, 0, time.monotonic()
    with service.client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                first = first or time.monotonic() - began
                ids += choice["token_ids"]
            cached = ((event.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens", cached)
    return ids, first, cached


def conversation(service: Service, number: int, turns: int) -> list[tuple[int, float, float, int, float, float]]:
    """Per turn: prompt tokens, TTFT shared and anew, cached tokens, bytes moved shared and anew."""
    history, rows = [], []
    for turn in range(turns):
        history += [10 + (977 * number + 131 * turn + 7 * index) % 5000 for index in range(NEW)]
        before = moved(service)
        ids, shared, cached = ask(service, history, f"c{number}")
        middle = moved(service)
        anew, alone, _ = ask(service, history, f"c{number}t{turn}")
        assert ids == anew, f"turn {turn} of conversation {number}: other tokens"
        rows.append((len(history), shared, alone, cached, middle - before, moved(service) - middle))
        history += ids
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--conversations", type=int, default=3)
    found = parser.parse_args()
    text = topology(f"sample:{found.model}", kv_cache_gb=0.5)
    with tempfile.TemporaryDirectory(prefix="px") as folder, running(Run(Path(folder), poison=False), text) as service:
        ask(service, [5] * 40, "warm")
        rows = [conversation(service, number, found.turns) for number in range(found.conversations)]
    print("turn  prompt  cached  TTFT ms     anew  ratio  moved KiB     anew")
    for turn, several in enumerate(zip(*rows, strict=True)):
        prompt, shared, alone, cached, few, many = (statistics.median(column) for column in zip(*several, strict=True))
        print(f"{turn + 1:4} {prompt:7.0f} {cached:7.0f} {shared * 1e3:8.0f} {alone * 1e3:8.0f} {alone / shared:6.2f} "
              f"{few / 1024:10.0f} {many / 1024:8.0f}")  # fmt: skip
    every = [row for several in rows for row in several]
    prompts, hits, few, many = (sum(row[column] for row in every) for column in (0, 3, 4, 5))
    print(f"{len(every)} turns with equal tokens: {hits:.0f} of {prompts:.0f} prompt tokens not computed (hit rate "
          f"{hits / prompts:.2f}), {few / 2**20:.1f} of {many / 2**20:.1f} MiB moved ({few / many:.2f})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
