"""What one proxy and one agent pay for each engine that they know: memory, routing, news, probes.

python -m benchmarks.cluster.members [--engines 64 256 1024 4096 10000]
"""

from __future__ import annotations

import argparse
import json
import random
from functools import partial

import msgspec

from benchmarks.cluster.fleet import KEYS, addresses, fleet, memory, seconds
from pdctl.adapters import Condition
from pdctl.host.processor import cpu_name
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.engines.routing import Ask, choose, min_expected_latency
from pdctl.proxy_wire import ProxyConfig
from pdctl.registry import Change, Entry
from pdctl.supervisor.cluster.entries import EngineEntry
from pdctl.supervisor.cluster.membership import Membership
from pdctl.supervisor.service.proxies import Slots


def pool_of(entries: list[EngineEntry]) -> EnginePool:
    pool = EnginePool.of(addresses(entries), "secret")
    for engine in pool.engines:
        engine.healthy, engine.condition = True, Condition(usable=True)
    return pool


def route(pool: EnginePool) -> None:
    ask = Ask(1000.0, random.randrange(10**6), random.random(), 2.0, 0.2)
    assert choose(min_expected_latency, pool.views(), ask) is not None


def put(entry: EngineEntry, revision: int) -> Change:
    key = KEYS.engine(entry.node, entry.name)
    return Change(key, Entry(key, msgspec.json.encode(entry), revision, revision, 1), revision)


def known(entries: list[EngineEntry]) -> Membership:
    membership = Membership("other", 60)
    membership.take([put(entry, number) for number, entry in enumerate(entries, 1)], 0.0)
    return membership


def one_by_one(entries: list[EngineEntry]) -> None:
    """As a watch tells it when a fleet starts."""
    membership = Membership("other", 60)
    for number, entry in enumerate(entries, 1):
        membership.take([put(entry, number)], 0.0)


def config(entries: list[EngineEntry]) -> ProxyConfig:
    slots = Slots().of(entry.name for entry in entries)
    made = [msgspec.structs.replace(each, slot=slots[each.name]) for each in addresses(entries)]
    return ProxyConfig("growth", "m", "min_expected_latency", 2000, 200, 2048, made)


def row(count: int) -> list[str]:
    entries = fleet(count)
    pool = pool_of(entries)
    routing = seconds(partial(route, pool), 31)
    made = config(entries)
    text = json.dumps(msgspec.to_builtins(made)).encode()
    membership = known(entries)
    one = put(msgspec.structs.replace(entries[0], epoch="anew"), count + 1)
    reload = seconds(lambda: pool.follow(msgspec.json.decode(text, type=ProxyConfig).engines, (), False), 3)
    return [
        f"{count}",
        f"{1e6 * routing:.0f}",
        f"{memory(lambda: pool_of(entries)) / 2**20:.1f}",
        f"{memory(lambda: known(entries)) / 2**20:.1f}",
        f"{len(text) / 1000:.0f}",
        f"{1e3 * seconds(lambda: config(entries), 3):.1f}",
        f"{1e3 * reload:.1f}",
        f"{1e6 * seconds(lambda: membership.take([one], 1.0), 31):.0f}",
        f"{1e3 * seconds(lambda: one_by_one(entries), 1):.0f}",
        f"{count * 2}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[64, 256, 1024, 4096, 10_000])
    counts = parser.parse_args().engines
    print(cpu_name())
    print("| engines | route, us | proxy's list, MiB | agent's list, MiB | proxy.json, kB | write it, ms | reload, ms "
          "| one news, us | start, ms | probes /s |")  # fmt: skip
    print("|" + "---|" * 10)
    for count in counts:
        print("| " + " | ".join(row(count)) + " |", flush=True)


if __name__ == "__main__":
    main()
