"""CPU time of the supervisor, and of its proxy, with the live page off, on without a viewer, and with one.

python -m benchmarks.live_page [--seconds 60] [--load]
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import psutil

from tests.service import Service, running, temporary_run, topology


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--load", action="store_true", help="four streams run all the time")
    options = parser.parse_args()
    with temporary_run() as run, running(run, topology()) as service, ExitStack() as stack:
        service.healthy()
        answers = stack.enter_context(load(service)) if options.load else []
        print("| page | supervisor, % of a core | proxy, % of a core | supervisor, MB |\n|---|---|---|---|")
        tell("off", service, options.seconds)
        link = service.run.cli("dash", check=True).stdout.strip()
        tell("on, nobody looks", service, options.seconds)
        with watching(link) as counts:
            tell("one viewer", service, options.seconds)
        print(f"\n{counts[0]} updates, {counts[1] / max(1, counts[0]):.0f} bytes each; {len(answers)} answers")


def tell(name: str, service: Service, seconds: float) -> None:
    supervisor, proxy = psutil.Process(service.status().supervisor_pid), psutil.Process(service.process("proxy").pid)
    # What has just begun is not measured.
    time.sleep(5)
    before = spent(supervisor), spent(proxy)
    time.sleep(seconds)
    used = spent(supervisor) - before[0], spent(proxy) - before[1]
    memory = supervisor.memory_info().rss / 1e6
    print(f"| {name} | {used[0] / seconds:.2%} | {used[1] / seconds:.2%} | {memory:.1f} |", flush=True)


def spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def load(service: Service) -> Iterator[list[int]]:
    """Four answers at a time. Gives their sizes, as they end."""
    done = threading.Event()
    sizes: list[int] = []

    def one() -> None:
        body = {"prompt": "The quick brown fox " * 20, "max_tokens": 200, "stream": True, "ignore_eos": True}
        while not done.is_set():
            url = f"{service.url}/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as answer:
                answer.raise_for_status()
                sizes.append(len(answer.read()))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield sizes
    finally:
        done.set()
        for thread in threads:
            thread.join()


@contextmanager
def watching(link: str) -> Iterator[list[int]]:
    """Read the page's updates, and ask for requests as the page does. Gives the number of updates and their bytes."""
    page, _, token = link.partition("#")
    headers, counts, done = {"authorization": f"Bearer {token}"}, [0, 0], threading.Event()

    def follow() -> None:
        with httpx.stream("GET", f"{page}api/live", headers=headers, timeout=30, trust_env=False) as answer:
            for line in answer.iter_lines():
                if done.is_set():
                    return
                counts[0] += 1
                counts[1] += len(line)
                if counts[0] % 2 == 0 and (json.loads(line)["samples"].get("answered_s") or [0])[-1]:
                    httpx.get(f"{page}api/requests", headers=headers, trust_env=False)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield counts
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
