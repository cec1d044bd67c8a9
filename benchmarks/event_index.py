"""What a proxy pays to follow the KV events of engines: reading news, learning a prompt's tokens, the choice, memory.

python -m benchmarks.event_index [--engines 64] [--blocks 100000]

Half of the engines prefill; each has its part of the blocks, of 16 tokens. Prompts of 16 KiB and 4,096 tokens.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from functools import partial

import msgspec

from benchmarks.cluster.fleet import addresses, fleet, memory
from benchmarks.prefix_index import microseconds, route
from pdctl.adapters import Condition
from pdctl.host.processor import cpu_name
from pdctl.net.prefixes.beginnings import MOST_PIECES, PIECE_BYTES, beginning_of
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.engines.prefixes.batches import Batches, parsed
from pdctl.proxy.engines.prefixes.places import Places
from pdctl.proxy.engines.routing import prefix_aware

_SIZE, _TOKENS, _KEY = 16, 4096, b"key"


def batch(token_ids: list[int], ts: float) -> bytes:
    """A prompt's blocks, as vLLM 0.32 writes them: hashes of 32 bytes."""
    event = {
        "type": "BlockStored", "block_hashes": [os.urandom(32) for _ in range(len(token_ids) // _SIZE)],
        "parent_block_hash": None, "token_ids": token_ids, "block_size": _SIZE, "lora_id": None, "medium": "GPU",
        "lora_name": None, "group_idx": 0,
    }  # fmt: skip
    return msgspec.msgpack.encode([ts, [event], 0])


def prompt() -> list[int]:
    return [random.randrange(150_000) for _ in range(_TOKENS)]


def filled(count: int) -> Batches:
    """So many blocks, of prompts that have nothing in common."""
    made = Batches()
    for number in range(count * _SIZE // _TOKENS):
        made.take(number, parsed(batch(prompt(), number)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=100_000)
    given = parser.parse_args()
    pool = EnginePool.of(addresses(fleet(given.engines)), "secret")
    prompts = [os.urandom(MOST_PIECES * PIECE_BYTES) for _ in range(16)]
    tokens = [prompt() for _ in prompts]
    for number, engine in enumerate(pool.engines):
        engine.healthy, engine.condition = True, Condition(usable=True)
        theirs = [ids for at, ids in enumerate(tokens) if (at + number) % 4 == 0]
        others = [prompt() for _ in range(given.blocks * _SIZE // _TOKENS // given.engines * 2 - len(theirs))]
        for at, ids in enumerate([*theirs, *others] if engine.address.role == "prefill" else []):
            engine.prefixes.heard_batch(at, batch(ids, at), time.monotonic())
    places: Places = pool._places
    for text, ids in zip(prompts, tokens, strict=True):
        places.note(beginning_of(text, _KEY), ids, "", _SIZE, lambda block: True)
    blocks = sum(engine.prefixes.blocks for engine in pool.engines)
    print(f"{given.engines} engines, {blocks} blocks; {cpu_name()}; CPU time, medians")
    print(f"{'a choice by prefix_aware':<40} {microseconds(partial(route, pool, prefix_aware, prompts))}")
    news = batch(prompt(), 1.0)

    def read() -> None:
        Batches().take(0, parsed(news))

    print(f"{f'news of a prompt of {_TOKENS} tokens':<40} {microseconds(read)}, {len(news)} bytes")
    beginning = beginning_of(prompts[0], _KEY)
    learn = partial(Places().note, beginning, tokens[0], "", _SIZE, lambda block: True)
    print(f"{'learning its pieces':<40} {microseconds(learn)}")
    print(f"{f'memory of {given.blocks} blocks':<40} {memory(lambda: filled(given.blocks)) / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
