"""Duration of a hand-over, compared with a plain copy of the same bytes in the same run.

    python benchmarks/hand_over.py [--model gemma-3-270m] [--rounds 10]

Hand-over: from the moment the decode engine's front has the request until its KV is committed and decoding may begin
(claim, reservation, transfer, commit), by the engine's own clock. Pull: the transfer alone. Copy: numpy between two
shared mappings of the pool's size, with all pages present, on the decode engine's CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pdctl.engine.cache.memory import Memory
from pdctl.engine.samples.prepare import prepare, show_progress
from pdctl.host.models import locate_model
from pdctl.host.users import cache_root
from tests.e2e.parity import prompts
from tests.service import Run, Service, running, topology

LENGTHS = (256, 1000, 1900)


def copy_seconds(num_bytes: int) -> float:
    """One copy of `num_bytes` at a new offset of two mappings, as in a pull."""
    size = 512 * 2**20
    source, target = (Memory(size, "00").bytes for _ in range(2))
    source[:] = 1
    times = []
    for start in range(0, size - num_bytes, max(num_bytes, size // 12)):
        began = time.perf_counter()
        target[start : start + num_bytes] = source[start : start + num_bytes]
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def one(service: Service, prompt: list[int]) -> tuple[float, float, int]:
    """Hand-over seconds, pull seconds and bytes of one request."""
    before = service.engine_state("decode-0")["transfers"]
    service.complete(prompt, max_tokens=3, ignore_eos=True)
    after = service.engine_state("decode-0")["transfers"]
    assert after["pulls"] == before["pulls"] + 1
    return (
        after["hand_over_seconds"] - before["hand_over_seconds"],
        after["seconds"] - before["seconds"],
        int(after["bytes"] - before["bytes"]),
    )


def main() -> None:
    """Print milliseconds and the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    located = locate_model(f"sample:{options.model}", cache_root())
    path = Path(prepare(located.spec, located.path, show_progress))
    run = Run(Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp")))
    # In one piece: the cost of a hand-over when no KV was read early.
    text = topology(located.spec, engine_extra="cpus = [0]").replace("[transfer]", "[transfer]\nchunked = false")
    run.poison = False
    first, second = text.split('name = "decode"')
    text = first + 'name = "decode"' + second.replace("cpus = [0]", "cpus = [1]")
    rows = []
    with running(run, text) as service:
        one(service, prompts(path, (64,))[0])
        for length in LENGTHS:
            prompt = prompts(path, (length,))[0]
            found = [one(service, prompt) for _ in range(options.rounds)]
            rows.append((length, *(statistics.median(column) for column in zip(*found, strict=True))))
    os.sched_setaffinity(0, {1})
    print(f"\n{options.model}, median of {options.rounds}, milliseconds")
    print("  tokens      MB  hand-over    pull    copy  (hand-over - 5 ms) / copy   pull / copy   GB/s")
    for length, hand_over, pull, moved in rows:
        copy = copy_seconds(int(moved))
        print(
            f"  {length:6d}  {moved / 1e6:6.1f}  {hand_over * 1e3:9.2f}  {pull * 1e3:6.2f}  {copy * 1e3:6.2f}"
            f"  {(hand_over - 0.005) / copy:25.2f}  {pull / copy:12.2f}  {moved / pull / 1e9:5.1f}"
        )


if __name__ == "__main__":
    main()
