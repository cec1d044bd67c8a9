"""Services with engines of different widths, and what they are asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests.fakes import gpu
from tests.service import Service, free_port, running, temporary_run

Answers = list[list[int]]


class Width(NamedTuple):
    """Processes of each stage of each prefill and decode engine, tokens of their blocks, how KV moves, stages, and
    stripes. No decode engine: one engine does both. `keeps`: pools are small, and what they give up goes to host memory
    and a store. `apart`: pools are in memory of their own, as on GPUs (tests/fakes/gpu)."""

    prefill: int
    decode: int = 0
    prefill_block: int = 16
    decode_block: int = 16
    transport: str = "shm"
    prefill_stages: int = 1
    decode_stages: int = 1
    prefill_stripes: int = 1
    decode_stripes: int = 1
    data_parallel: int = 1
    keeps: bool = False
    apart: bool = False

    @property
    def prefill_ranks(self) -> int:
        """Processes of each prefill engine."""
        return self.prefill * self.prefill_stages * self.prefill_stripes

    @property
    def decode_ranks(self) -> int:
        """Processes of each decode engine."""
        return self.decode * self.decode_stages * self.decode_stripes

    def __str__(self) -> str:
        prefill = _size(self.prefill, self.prefill_stages, self.prefill_stripes)
        decode = _size(self.decode, self.decode_stages, self.decode_stripes)
        kept = (", small pools and a store" if self.keeps else "") + (", as on GPUs" if self.apart else "")
        if not self.decode:
            return f"one engine of {prefill}{kept}"
        blocks = f"blocks {self.prefill_block} -> {self.decode_block}"
        times = f"{self.data_parallel} times " if self.data_parallel > 1 else ""
        return f"{times}P {prefill} -> D {decode}, {blocks}, {self.transport}{kept}"


def _size(ranks: int, stages: int, stripes: int) -> str:
    if stripes > 1:
        return f"{stripes} stripes"
    return f"{ranks} x {stages} stages" if stages > 1 else str(ranks)


SINGLE = Width(1)
MATRIX = [
    Width(2),
    Width(2, 2),
    Width(2, 1),
    Width(1, 2),
    Width(2, 1, 16, 32),
    Width(1, 2, 32, 16),
    Width(2, 2, 16, 32),
    Width(4, 2),
    Width(2, 2, transport="mooncake"),
    Width(2, 1, transport="mooncake"),
    Width(1, 2, 16, 32, "mooncake"),
    Width(1, prefill_stages=2),
    Width(2, prefill_stages=2),
    Width(1, 1, prefill_stages=2, decode_stages=2),
    Width(1, 1, prefill_stages=2),
    Width(1, 1, 16, 32, decode_stages=2),
    Width(2, 1, 16, 32, prefill_stages=2),
    Width(1, 2, transport="mooncake", prefill_stages=2),
    Width(1, prefill_stripes=2),
    Width(1, 1, prefill_stripes=2),
    Width(1, 1, 16, 32, decode_stripes=2),
    Width(1, 2, 32, 16, "mooncake", prefill_stripes=2),
    Width(1, 1, data_parallel=2),
    Width(2, 1, data_parallel=2),
    Width(2, keeps=True),
    Width(2, 1, keeps=True),
    Width(1, 2, 16, 32, "mooncake", prefill_stages=2, keeps=True),
    Width(2, 2, transport="auto", apart=True),
    Width(2, 1, 16, 32, transport="auto", keeps=True, apart=True),
    Width(1, 2, transport="mooncake", prefill_stages=2, apart=True),
    Width(1, 1, transport="shm", prefill_stripes=2, apart=True),
]
# A pool of tiny models with 100 blocks or so.
_SMALL_GB = 0.0016
_STORE = """
[[stores]]
name = "kv"
kind = "mooncake"
segment_gb = 0.03125
buffer_gb = 0.03125
"""


class Ask(NamedTuple):
    """A request: prompt, and how tokens are chosen."""

    prompt: list[int]
    options: dict[str, Any]


def asks(vocabulary: int, tokens: int) -> list[Ask]:
    """Prompts of less than a block, of whole blocks, and of several chunks; greedy and seeded."""
    prompts = [
        [(index * 37 + length * 11) % (vocabulary - 10) + 3 for index in range(length)]
        for length in (1, 15, 16, 33, 100, 320, 700)
    ]
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "seed": 8, "top_p": 0.9, "presence_penalty": 0.4},
    ]
    return [Ask(prompt, {**way, "max_tokens": tokens, "ignore_eos": True}) for prompt in prompts for way in ways]


@contextmanager
def service_of(width: Width, model: str, kv_cache_gb: float = 0.05) -> Iterator[Service]:
    """A running service of these widths."""
    with temporary_run() as run, TemporaryDirectory() as folder:
        env = gpu.environment(Path(folder)) if width.apart else {}
        with running(run, _topology(width, model, kv_cache_gb, env)) as service:
            service.healthy()
            yield service


def answers(service: Service, wanted: list[Ask], at_once: int = 4) -> Answers:
    """The tokens of each answer."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda ask: list(service.stream(ask.prompt, **ask.options)["token_ids"]), wanted))


def _topology(width: Width, model: str, kv_cache_gb: float, env: dict[str, str]) -> str:
    engines = [
        ("prefill", width.prefill, width.prefill_stages, width.prefill_stripes, width.prefill_block),
        ("decode", width.decode, width.decode_stages, width.decode_stripes, width.decode_block),
    ]
    if not width.decode:
        engines = [("hybrid", *engines[0][1:])]
    text = f"""
[service]
name = "t"
model = "{model}"
served_model_name = "m"
max_model_len = 2048
[proxy]
port = {free_port()}
[transfer]
backend = "{width.transport}"
"""
    kv_cache_gb = _SMALL_GB if width.keeps else kv_cache_gb
    for role, count, stages, stripes, block in engines:
        text += f"""
[[engines]]
name = "{role}"
role = "{role}"
dtype = "float32"
tensor_parallel = {count}
pipeline_parallel = {stages}
data_parallel = {width.data_parallel}
sequence_parallel = {stripes}
block_size = {block}
kv_cache_gb = {kv_cache_gb}
inline_prefill = false
env = {{ {", ".join(f"{name} = {json.dumps(value)}" for name, value in env.items())} }}
"""
        text += f'kv_offload_gb = {_SMALL_GB}\nstore = "kv"\nfetch_prefixes = true\n' if width.keeps else ""
    return text + (_STORE if width.keeps else "")
