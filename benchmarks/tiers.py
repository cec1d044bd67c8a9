"""What it costs to copy the KV of every prompt to host memory or to a store, and how long it takes to get it back.

    python -m benchmarks.tiers [--model gemma-3-270m] [--prompts 12] [--length 600] [--rounds 3]

Three services with one engine each: without tiers, with `kv_offload_gb`, with `store`. All get equal prompts by turns.
First prompts that nobody has asked before: CPU seconds of the core for each. Then all of them again, when the pool has
given them up: seconds to the first token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack

import psutil

from benchmarks.fetched_prefixes import STORE, told
from benchmarks.prefix_cache import ask
from tests.service import Service, pid_of, running, single, temporary_run

WAYS = {"none": "", "host memory": "kv_offload_gb = 2", "store": 'store = "kv"'}


def core_s(service: Service) -> float:
    """CPU seconds of the engine's core so far."""
    [core] = psutil.Process(pid_of(service.process("hybrid-0"))).children()
    times = core.cpu_times()
    return float(times.user + times.system)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--length", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-gb", type=float, default=0.1)
    args = parser.parse_args()
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    first: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        services = {}
        for way, keys in WAYS.items():
            run = stack.enter_context(temporary_run())
            text = single(model=f"sample:{args.model}", kv_cache_gb=args.kv_gb, engine_extra=keys)
            services[way] = stack.enter_context(running(run, text + (STORE if way == "store" else "")))
            ask(services[way], told(9000, args.length), "warm")
        for number in range(args.rounds):
            numbers = range(number * args.prompts, (number + 1) * args.prompts)
            # Copies are made after the answer: what counts is the CPU of all prompts together.
            before = {way: core_s(service) for way, service in services.items()}
            for one in numbers:
                for service in services.values():
                    ask(service, told(one, args.length), "s")
            for way, service in services.items():
                cpu[way].append((core_s(service) - before[way]) / len(numbers))
            for one in numbers:
                answers = []
                for way, service in services.items():
                    ids, first_s, _ = ask(service, told(one, args.length), "s")
                    first[way].append(first_s)
                    answers.append(ids)
                if answers != [answers[0]] * len(answers):
                    print(f"prompt {one}: other tokens")
                    return 1
    base, again = statistics.median(cpu["none"]), statistics.median(first["none"])
    print(f"{'':14}CPU of a new prompt, s   ratio   TTFT when it comes again, s   ratio")
    for way in WAYS:
        new, back = statistics.median(cpu[way]), statistics.median(first[way])
        print(f"{way:14}{new:22.3f}{new / base:8.3f}{back:30.3f}{back / again:8.3f}")
    print("all answers have equal tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
