"""A real etcd with the keys of up to 10,000 engines: registration, lists, watches, renewals, a mass expiry.

    python -m benchmarks.cluster.one_etcd [--engines 256 1024 10000] [--watchers 32] [--renew-s 20]

One member on this machine, and everything through the registry client that ships.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil

from benchmarks.cluster.fleet import EACH, KEYS, engine, node_entry, node_name
from pdctl.host.processor import cpu_name
from pdctl.registry import Change, Put, Unavailable
from pdctl.registry.etcd.gateway import Gateway
from pdctl.registry.etcd.registry import EtcdRegistry
from pdctl.registry.mirror import follow
from tests.registry import etcd

Item = TypeVar("Item")
TTL_S = 10
_AT_ONCE = 8


async def each(items: Iterable[Item], work: Callable[[Item], Awaitable[None]]) -> float:
    """Do it for all, some at once; the seconds that it took."""
    limit = asyncio.Semaphore(_AT_ONCE)

    async def one(item: Item) -> None:
        async with limit:
            await work(item)

    begun = time.perf_counter()
    await asyncio.gather(*map(one, items))
    return time.perf_counter() - begun


class Watched:
    """What one watcher was told."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def tell(self, changes: tuple[Change, ...]) -> None:
        self.keys.update(change.key for change in changes)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def run(engines: int, watchers: int, renew_s: float, url: str, process: psutil.Process) -> list[str]:
    registry = EtcdRegistry(Gateway([url]))
    nodes, watched = range(engines // EACH), [Watched() for _ in range(watchers)]
    leases: dict[int, int] = {}
    failures: list[int] = []

    async def register(number: int) -> None:
        while True:
            with contextlib.suppress(Unavailable):
                return await told(number)
            failures.append(number)

    async def told(number: int) -> None:
        lease = leases[number] = await registry.grant(600)
        made = [engine(number, place, f"decode-{number * EACH + place}") for place in range(EACH)]
        await registry.write([Put(KEYS.node(node_name(number)), msgspec.json.encode(node_entry(number)), lease)])
        await registry.write([Put(KEYS.engine(e.node, e.name), msgspec.json.encode(e), lease) for e in made])

    listeners = [EtcdRegistry(Gateway([url])) for _ in range(watchers)]
    tasks = [
        asyncio.create_task(follow(listener, KEYS.engines, one.tell, lambda _: None))
        for listener, one in zip(listeners, watched, strict=True)
    ]
    await asyncio.sleep(0.5)
    begun = time.perf_counter()
    register_s = await each(nodes, register)
    while any(len(one.keys) < engines for one in watched):
        await asyncio.sleep(0.01)
    heard_s = time.perf_counter() - begun
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    begun = time.perf_counter()
    assert len((await registry.list(KEYS.engines)).entries) == engines
    list_s = time.perf_counter() - begun
    renewals, server, ours = await _renew(registry, list(leases.values()), renew_s, process)
    expiry_s = await _expire(registry, leases)
    for client in (registry, *listeners):
        await client.close()
    figures = (1e3 * list_s, renewals, 100 * server, 100 * ours)
    rss = process.memory_info().rss / 2**20
    return [f"{engines}", f"{register_s:.1f}", f"{len(failures)}", f"{heard_s:.1f}",
            *(f"{figure:.0f}" for figure in figures), f"{expiry_s:.1f}", f"{rss:.0f}"]  # fmt: skip


async def _renew(
    registry: EtcdRegistry, leases: list[int], for_s: float, process: psutil.Process
) -> tuple[float, float, float]:
    """Keep leases as agents do: each three times in a lease's time. Renewals per second, and the parts of a core that
    etcd and this process use."""

    async def keep(lease: int) -> None:
        with contextlib.suppress(Unavailable):  # a late answer: the agent asks again
            await registry.keep(lease)

    cpu, ours, begun, count = process.cpu_times(), _cpu_s(), time.perf_counter(), 0
    pause = TTL_S / 3 / len(leases)
    due = begun
    async with asyncio.TaskGroup() as tasks:
        while time.perf_counter() - begun < for_s:
            tasks.create_task(keep(leases[count % len(leases)]))
            count += 1
            due += pause
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    took = time.perf_counter() - begun
    used = process.cpu_times()
    server = used.user + used.system - cpu.user - cpu.system
    return count / took, server / took, (_cpu_s() - ours) / took


async def _expire(registry: EtcdRegistry, leases: dict[int, int]) -> float:
    """All nodes vanish: until the registry is empty."""

    async def revoke(number: int) -> None:
        await registry.revoke(leases[number])

    taken = await each(leases, revoke)
    assert (await registry.list(KEYS.engines)).entries == ()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[256, 1024, 10_000])
    parser.add_argument("--watchers", type=int, default=32)
    parser.add_argument("--renew-s", type=float, default=20.0)
    given = parser.parse_args()
    print(cpu_name())
    print(f"| engines | registered, s | calls again | {given.watchers} watchers know all, s | list, ms | renewals /s "
          "| etcd, % of a core | client, % of a core | all revoked, s | etcd's RSS, MiB |")  # fmt: skip
    print("|" + "---|" * 10)
    for engines in given.engines:
        with tempfile.TemporaryDirectory() as folder, etcd.members(Path(folder), 1) as [member]:
            process = psutil.Process(member.process.pid)
            found = asyncio.run(run(engines, given.watchers, given.renew_s, member.url, process))
        print("| " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main()
