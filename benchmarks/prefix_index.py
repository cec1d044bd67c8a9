"""What a proxy pays to route by what engines say they have: the choice, a prompt's names, news, memory.

python -m benchmarks.prefix_index [--engines 64] [--pieces 100000]

Prompts of 16 KiB, the longest that have names for every piece. Half of the engines prefill; each has its part of the
pieces. "min_expected_latency" is the same choice without prefixes.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.cluster.fleet import addresses, fleet, memory, seconds
from pdctl.adapters import Condition
from pdctl.host.processor import cpu_name
from pdctl.net.prefixes.beginnings import MOST_PIECES, PIECE_BYTES, beginning_of, from_header, to_header
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.engines.prefixes.known import KnownPrefixes
from pdctl.proxy.engines.routing import Ask, RoutingPolicy, choose, min_expected_latency, prefix_aware
from pdctl.wire import BlocksReply

# Blocks of a reply of an engine that computes 10,000 tokens a second and is asked 50 times a second, and more.
_NEWS = 16
_KEY = b"key"


def told(pool: EnginePool, prompts: Sequence[bytes], pieces: int) -> None:
    """Each prefill engine has a part of the prompts, whole or their beginnings, and other pieces."""
    prefills = [engine for engine in pool.engines if engine.address.role == "prefill"]
    each = pieces // len(prefills)
    for number, engine in enumerate(prefills):
        theirs = [prompt for at, prompt in enumerate(prompts) if (at + number) % 4 == 0]
        own = [piece for prompt in theirs for piece in beginning_of(prompt, _KEY).pieces]
        others = [random.getrandbits(64) for _ in range(max(0, each - len(own)))]
        engine.prefixes.heard(BlocksReply("e", 1, True, [*own, *others], []), 0.0)


def route(pool: EnginePool, policy: RoutingPolicy, prompts: Sequence[bytes]) -> None:
    """As the proxy does it for a request."""
    prompt = random.choice(prompts)
    pieces = beginning_of(prompt, _KEY).pieces if policy is prefix_aware else ()
    ask = Ask(float(len(prompt)), random.randrange(10**6), random.random(), 2.0, 0.2)
    assert choose(policy, pool.views(pieces), ask) is not None


def microseconds(work: Callable[[], object], times: int = 101) -> str:
    """The median, for people."""
    return f"{1e6 * seconds(work, times):8.1f} us"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--pieces", type=int, default=100_000)
    given = parser.parse_args()
    pool = EnginePool.of(addresses(fleet(given.engines)), "secret")
    for engine in pool.engines:
        engine.healthy, engine.condition = True, Condition(usable=True)
    prompts = [os.urandom(MOST_PIECES * PIECE_BYTES) for _ in range(16)]
    told(pool, prompts, given.pieces)
    pieces = sum(engine.prefixes.told for engine in pool.engines)
    print(f"{given.engines} engines, {pieces} pieces; {cpu_name()}; CPU time, medians")
    for name, policy in (("min_expected_latency", min_expected_latency), ("prefix_aware", prefix_aware)):
        print(f"{name:<40} {microseconds(partial(route, pool, policy, prompts))}")
    found = beginning_of(prompts[0])
    print(f"{'of which names of a prompt of 16 KiB':<40} {microseconds(lambda: beginning_of(prompts[0]))}")
    both = microseconds(lambda: from_header(to_header(found).decode()))
    print(f"{'its header, and reading it':<40} {both}, {len(to_header(found))} bytes")
    known = pool.engines[0].prefixes
    news = BlocksReply("e", 1, False, [random.getrandbits(64) for _ in range(_NEWS)], [])
    print(f"{f'news of {_NEWS} pieces':<40} {microseconds(lambda: known.heard(news, 0.0))}")

    def one() -> KnownPrefixes:
        made = KnownPrefixes()
        made.heard(BlocksReply("e", 1, True, [random.getrandbits(64) for _ in range(given.pieces)], []), 0.0)
        return made

    print(f"{f'memory of {given.pieces} pieces':<40} {memory(one) / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
