"""Speed of KV transfer with each transport, compared with a memory copy and with the transport's library alone.

    python benchmarks/transfer_speed.py [--rounds 40]

64 MiB in one span, and 1,000 blocks of 64 KiB in an order that cannot be merged. The methods alternate in random order;
ratios compare medians. CPU is the CPU time of this (reading) process, in seconds per GiB.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import Memory
from pdctl.engine.probe import Place, scattered, scratch_peer
from pdctl.engine.transfer import Settings, transport_kind

SIZE = 64 * 2**20
Way = Callable[[list[Span]], object]


def copying(target: Memory) -> Way:
    """numpy, from a pool of this process into the same target: the memory's place changes the speed by a quarter."""
    source = Memory(SIZE, "source")
    source.bytes[:] = np.random.default_rng(2).integers(0, 256, SIZE, dtype=np.uint8)

    def copy(spans: list[Span]) -> None:
        for s, t, n in spans:
            target.bytes[t : t + n] = source.bytes[s : s + n]

    return copy


def ours(name: str, address: str, memory: Memory) -> Way:
    """Through pdctl's transport."""
    transport = transport_kind(name).open_transport(memory, Settings("reader", serving=False))
    return lambda spans: transport.read(address, SIZE, spans, 60.0)


def raw_mooncake(address: str, memory: Memory) -> dict[str, Way]:
    """The library's own API, used directly."""
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(memory.base, SIZE) == 0
    session, base, *_ = address.split("/")

    def lists(spans: list[Span]) -> tuple[list[int], list[int], list[int]]:
        return [memory.base + t for _, t, _ in spans], [int(base) + s for s, _, _ in spans], [n for *_, n in spans]

    def sync(spans: list[Span]) -> None:
        assert engine.batch_transfer_sync_read(session, *lists(spans)) == 0

    def batch(spans: list[Span]) -> None:
        assert engine.get_batch_transfer_status([engine.batch_transfer_async_read(session, *lists(spans))]) == 0

    def polled(spans: list[Span]) -> None:
        left = [engine.batch_transfer_async_read(session, [a], [b], [n]) for a, b, n in zip(*lists(spans), strict=True)]
        while left:
            status = engine.transfer_check_status(left[0])
            assert status >= 0
            if status == 1:
                left.pop(0)
            else:
                time.sleep(0.0003)

    return {"mooncake raw, sync": sync, "mooncake raw, async batch": batch, "mooncake raw, async polled": polled}


def measure(ways: dict[str, Way], spans: list[Span], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds and CPU seconds per GiB of each method; the methods alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, float] = dict.fromkeys(ways, 0.0)
    moved = sum(n for *_, n in spans) * rounds / 2**30
    order = list(ways.items())
    for _ in range(rounds):
        random.shuffle(order)
        for name, way in order:
            before, started = os.times(), time.perf_counter()
            way(spans)
            seconds[name].append(time.perf_counter() - started)
            after = os.times()
            cpu[name] += after.user + after.system - before.user - before.system
    return {name: (statistics.median(taken), cpu[name] / moved) for name, taken in seconds.items()}


def main() -> None:
    """Print both tables and the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    memory = Memory(SIZE, "reader")
    shapes = {"64 MiB in one span": [Span(0, 0, SIZE)], "1,000 blocks of 64 KiB": scattered(SIZE)}
    found: dict[str, dict[str, tuple[float, float]]] = {title: {} for title in shapes}

    def run(ways: dict[str, Way]) -> None:
        for title, spans in shapes.items():
            for way in ways.values():
                way(spans)
            found[title] |= measure(ways, spans, rounds)

    # Each library's threads stay active in this process: shared memory is measured before they exist.
    with scratch_peer(Place("shm", "auto", SIZE), set()) as shm:
        run({"numpy copy": copying(memory), "shm": ours("shm", shm, memory)})
    with scratch_peer(Place("mooncake", "tcp", SIZE), set()) as mooncake:
        run({"mooncake": ours("mooncake", mooncake, memory), **raw_mooncake(mooncake, memory)})
    with scratch_peer(Place("nixl", "auto", SIZE), set()) as nixl:
        run({"nixl": ours("nixl", nixl, memory)})
    for title, spans in shapes.items():
        show(title, found[title], sum(n for *_, n in spans))


def show(title: str, found: dict[str, tuple[float, float]], num_bytes: int) -> None:
    """One table."""
    copy = found["numpy copy"][0]
    raw = min(seconds for name, (seconds, _) in found.items() if "raw" in name)
    print(f"\n{title}\n{'':28}     ms    GB/s  / copy  / best raw  CPU s/GiB")
    for name, (seconds, cpu) in found.items():
        against = f"{seconds / raw:10.2f}" if "mooncake" in name else " " * 10
        rate = num_bytes / seconds / 1e9
        print(f"{name:28} {seconds * 1e3:6.1f}  {rate:6.2f}  {seconds / copy:6.2f} {against}  {cpu:9.2f}")


if __name__ == "__main__":
    main()
