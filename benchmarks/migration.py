"""Streams that move between engines: equal tokens, the pause of each move, and how long a drained restart waits.

    python -m benchmarks.migration [--model gemma-3-270m|tiny-qwen3] [--moves 20] [--streams 8] [--output 800]

One prefill and two decode engines with a real model. First, one stream at a time is moved at a random token index by a
drain of its engine, half of them sampled with a seed. The pause of a move is the longest gap between tokens until its
engine is drained, and half a second more; beside it stands the longest gap of all other stretches of that length. Then
a decode engine is restarted with a drain under `--streams` answers of `--output` tokens: how long the drain takes, and
how long these answers still run from its beginning, which is what a drain without moves would wait.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from pdctl.host.processor import cpu_name
from tests.service import Service, events, running, temporary_run, topology

PROMPT = "Once upon a time there was a scheduler that "
AFTER_S = 0.5


@dataclass
class Seen:
    """A stream as its client sees it. `at`: when each token came, seconds; `began`: enough tokens are here."""

    token_ids: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    began: threading.Event = field(default_factory=threading.Event)


def stream(service: Service, body: dict[str, object], begins_at: int, seen: Seen) -> Seen:
    asked = {"stream": True, "return_token_ids": True, "ignore_eos": True, **body}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=asked, timeout=600, trust_env=False) as answer:
        assert answer.status_code == 200, answer.read()
        for event in events(answer):
            for choice in event["choices"] if event else ():
                seen.token_ids += choice["token_ids"]
                seen.at += [time.monotonic()] * len(choice["token_ids"])
            if len(seen.token_ids) > begins_at:
                seen.began.set()
    return seen


def moved(service: Service) -> int:
    lines = service.client.get("/metrics").text.splitlines()
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith("pdctl_proxy_streams_moved"))


def busiest(service: Service) -> str:
    return max(("decode-0", "decode-1"), key=lambda name: int(service.engine_state(name)["answers"]))


def gaps(at: list[float], begin: float, end: float) -> float:
    """The longest gap between two tokens in this time."""
    found = [after - before for before, after in itertools.pairwise(at) if before < end and after > begin]
    return max(found, default=0.0)


def drained(service: Service, name: str) -> None:
    service.control.act(name, "drain")
    service.wait(lambda: service.control.status(measurements=False).process(name).state == "drained", what="a drain")  # type: ignore[union-attr]


def one_move(service: Service, body: dict[str, object], at: int) -> tuple[list[int], float, list[float]]:
    """The tokens of a stream that is moved, the pause of the move, and the longest gaps of other stretches."""
    seen = Seen()
    with ThreadPoolExecutor(1) as pool:
        running_ = pool.submit(stream, service, body, at, seen)
        seen.began.wait(300)
        name, began = busiest(service), time.monotonic()
        drained(service, name)
        ended = time.monotonic() + AFTER_S
        service.control.act(name, "start")
        running_.result(600)
    service.healthy()
    length = ended - began
    starts = [start for start in seen.at[:: max(1, len(seen.at) // 12)] if not began - length < start < ended]
    others = [gaps(seen.at, start, start + length) for start in starts if start + length < seen.at[-1]]
    return seen.token_ids, gaps(seen.at, began, ended), others


def moves(service: Service, count: int, output: int) -> None:
    chance, pauses, usual, equal = random.Random(3), list[float](), list[float](), 0
    before = moved(service)
    for number in range(count):
        body: dict[str, object] = {"prompt": f"{number} {PROMPT}" * chance.randint(1, 6), "max_tokens": output}
        body |= {"temperature": 0} if number % 2 else {"temperature": 0.8, "seed": number}
        quiet = stream(service, body, 0, Seen()).token_ids
        tokens, pause, others = one_move(service, body, chance.randint(2, output // 2))
        equal += tokens == quiet
        pauses.append(pause)
        usual += others
    print(f"{count} drains of an engine with one stream: {moved(service) - before} moved, {equal} with equal tokens")
    for name, values in (("move", pauses), ("no move", usual)):
        values.sort()
        p99 = values[min(len(values) - 1, int(len(values) * 0.99))]
        median = 1e3 * statistics.median(values)
        print(f"longest gap in a stretch with {name}: median {median:.0f} ms, p99 {1e3 * p99:.0f} ms")


def restart(service: Service, streams: int, output: int) -> None:
    found = [Seen() for _ in range(streams)]
    with ThreadPoolExecutor(streams) as pool:
        bodies = [{"prompt": f"{n} {PROMPT}", "max_tokens": output, "temperature": 0} for n in range(streams)]
        answers = [pool.submit(stream, service, body, 20, seen) for body, seen in zip(bodies, found, strict=True)]
        for seen in found:
            seen.began.wait(300)
        name, began = busiest(service), time.monotonic()
        here = service.engine_state(name)["answers"]
        drained(service, name)
        seconds = time.monotonic() - began
        service.run.cli("restart", name, check=True)
        for answer in answers:
            answer.result(600)
    last = max(seen.at[-1] for seen in found) - began
    whole = sum(len(seen.token_ids) == output for seen in found)
    print(f"a drained restart with {here} answers of {output} tokens: drained after {seconds:.2f} s;")
    print(f"the answers ran {last:.1f} s more elsewhere; {whole} of {streams} whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--output", type=int, default=800)
    arguments = parser.parse_args()
    print(f"{arguments.model} on {cpu_name()}")
    with temporary_run() as run:
        run.poison = False
        text = topology(f"sample:{arguments.model}", decodes=2, kv_cache_gb=0.5, inline=True)
        with running(run, text) as service:
            service.healthy()
            moves(service, arguments.moves, arguments.output)
            restart(service, arguments.streams, arguments.output)


if __name__ == "__main__":
    main()
