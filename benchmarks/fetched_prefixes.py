"""Prompts that begin alike, over two prefill and two decode engines: what is computed, and the time to the first token.

    python -m benchmarks.fetched_prefixes [--model gemma-3-270m] [--rounds 2] [--conversations 4] [--turns 5]
        [--requests 24] [--system 600] [--kv-gb 0.5] [--only NAME ...]

Two loads: conversations that grow turn by turn, all at once; and requests with one system prompt. Each is given to
services that differ in `routing` and in where KV can come from: from other engines (`fetch_prefixes`), a Mooncake Store
(`store`), host memory (`kv_offload_gb`). They run one after the other, in each round in another order. With a small
`--kv-gb` pools give up what conversations need again.
Exit code 1 if the tokens differ.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.prefix_cache import ask
from tests.service import Run, Service, running, topology

STORE = """
[[stores]]
name = "kv"
kind = "mooncake"
segment_gb = 0.5
buffer_gb = 0.125
"""
FETCH, KEEP, SHARE = 'fetch_prefixes = "auto"', "kv_offload_gb = 1", 'store = "kv"'
# By name: routing, and keys of engines.
WAYS = {
    "round_robin": ("round_robin", ()),
    "prefix_aware": ("prefix_aware", ()),
    "round_robin, fetch": ("round_robin", (FETCH,)),
    "prefix_aware, fetch": ("prefix_aware", (FETCH,)),
    "round_robin, store": ("round_robin", (SHARE,)),
    "prefix_aware, host memory": ("prefix_aware", (KEEP,)),
    "prefix_aware, all three": ("prefix_aware", (FETCH, KEEP, SHARE)),
}
NEW, AT_ONCE = 60, 4


@dataclass
class Found:
    """Of one way, over all rounds: seconds to first tokens, and tokens of prompts: all, and those computed."""

    first_s: list[float] = field(default_factory=list)
    tokens: float = 0.0
    computed: float = 0.0
    fetched: float = 0.0

    def row(self) -> str:
        times = sorted(self.first_s)
        median, high = (times[min(len(times) - 1, int(len(times) * part))] * 1e3 for part in (0.5, 0.99))
        saved = 1 - self.computed / self.tokens
        return f"{median:8.0f} {high:8.0f} {self.tokens:9.0f} {self.computed:9.0f} {self.fetched:8.0f} {saved:6.2f}"


def told(number: int, count: int) -> list[int]:
    """Tokens that begin differently for each number."""
    return [10 + (977 * number + 7 * index) % 5000 for index in range(count)]


def conversation(service: Service, number: int, turns: int) -> Iterator[tuple[list[int], float]]:
    """Answers and seconds to their first tokens, turn by turn."""
    history: list[int] = []
    for turn in range(turns):
        history += told(100 * number + turn, NEW)
        ids, first, _ = ask(service, history, "c")
        history += ids
        yield ids, first


def conversations(service: Service, args: argparse.Namespace) -> list[tuple[list[int], float]]:
    with ThreadPoolExecutor(args.conversations) as pool:
        made = pool.map(lambda number: list(conversation(service, number, args.turns)), range(args.conversations))
        return [answer for several in made for answer in several]


def one_system_prompt(service: Service, args: argparse.Namespace) -> list[tuple[list[int], float]]:
    system = told(7, args.system)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        prompts = [system + told(1000 + number, 20) for number in range(args.requests)]
        return [(ids, first) for ids, first, _ in pool.map(lambda prompt: ask(service, prompt, "s"), prompts)]


LOADS = {"conversations": conversations, "one system prompt": one_system_prompt}


def counted(service: Service) -> tuple[float, float, float]:
    """Tokens of prompts, those that were found, and those that came from elsewhere, over the prefill engines."""
    states = [service.engine_state(p.name)["counters"] for p in service.engines() if p.name.startswith("prefill")]
    def total(*names: str) -> float:
        return float(sum(state.get(name, 0) for state in states for name in names))

    return total("prefix_tokens"), total("prefix_hits"), total("prefix_tokens_fetched", "tier_prefix_tokens")


def tried(
    way: str, args: argparse.Namespace, found: dict[tuple[str, str], Found]
) -> dict[str, list[list[int]]]:
    """One service of this way under all loads. Returns the answers by load."""
    routing, keys = WAYS[way]
    text = topology(
        f"sample:{args.model}", prefills=2, decodes=2, kv_cache_gb=args.kv_gb, extra=f'routing = "{routing}"',
        engine_extra="\n".join(keys),
    )  # fmt: skip
    text += STORE if SHARE in keys else ""
    answers = {}
    with tempfile.TemporaryDirectory(prefix="px") as folder, running(Run(Path(folder), poison=False), text) as service:
        for number in range(4):
            ask(service, told(50 + number, 40), f"warm {number}")
        for load, give in LOADS.items():
            tokens, hits, fetched = counted(service)
            given = give(service, args)
            after = counted(service)
            row = found[load, way]
            row.first_s += [first for _, first in given]
            row.tokens += after[0] - tokens
            row.computed += after[0] - tokens - (after[1] - hits)
            row.fetched += after[2] - fetched
            answers[load] = [ids for ids, _ in given]
    return answers


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--system", type=int, default=600)
    parser.add_argument("--kv-gb", type=float, default=0.5)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    found: dict[tuple[str, str], Found] = defaultdict(Found)
    expected: dict[str, list[list[int]]] = {}
    for number in range(args.rounds):
        for way in random.Random(number).sample(args.only, len(args.only)):
            print(f"round {number}: {way}", file=sys.stderr)
            answers = tried(way, args, found)
            expected = expected or answers
            if answers != expected:
                print(f"{way}: other tokens")
                return 1
    print(f"{'':46}TTFT p50  p99 ms    prompt  computed  brought  saved")
    for load in LOADS:
        for way in args.only:
            print(f"{load + ', ' + way:46}{found[load, way].row()}")
    print("all answers have equal tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
