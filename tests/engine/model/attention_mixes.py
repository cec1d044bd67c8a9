"""Random mixes of sequences for attention backends, and what attention over them should give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pdctl.engine.model.attention import Backend
from pdctl.engine.model.attention.batch import Batch, Call, LayerNeed


@dataclass
class Mix:
    """Sequences over one layer's planes. Slots that belong to no sequence are NaN."""

    need: LayerNeed
    block_size: int
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    batch: Batch
    call: Call

    def found(self, backend: Backend) -> torch.Tensor:
        self.batch.notes.clear()
        backend.begin(self.batch)
        return backend.attend(self.query, self.keys, self.values, self.batch, self.call)

    def expected(self) -> torch.Tensor:
        """[T, H, Dv] in float64, with explicit masks."""
        starts, lengths, table = self.batch.host
        found = []
        for index, length in enumerate(lengths.tolist()):
            rows = slice(int(starts[index]), int(starts[index + 1]))
            slots = torch.from_numpy(table[index].astype(np.int64))[:, None] * self.block_size
            slots = (slots + torch.arange(self.block_size)).flatten()[:length]
            group = self.need.heads // self.need.kv_heads
            k = self.keys[slots].double().repeat_interleave(group, 1)
            v = self.values[slots].double().repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", self.query[rows].double(), k) * self.call.scale
            if self.call.softcap is not None:
                scores = self.call.softcap * torch.tanh(scores / self.call.softcap)
            at = torch.arange(length - scores.shape[1], length)[:, None]
            columns = torch.arange(length)[None]
            seen = columns <= at
            if self.call.window is not None:
                seen &= columns > at - self.call.window
            scores = scores.masked_fill(~seen, float("-inf"))
            if self.call.sinks is not None:
                extra = self.call.sinks.double().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
                scores = torch.cat([scores, extra], -1)
            found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], v))
        return torch.cat(found)


def mix(
    need: LayerNeed, block_size: int, dtype: torch.dtype, rows: list[tuple[int, int]], seed: int = 0
) -> Mix:
    """`rows`: for each sequence the tokens that are in the pool already, and the new ones. Blocks are scattered."""
    generator = torch.Generator().manual_seed(seed)
    lengths = np.array([context + count for context, count in rows], dtype=np.int32)
    used = [-(-int(length) // block_size) for length in lengths]
    blocks = torch.randperm(sum(used) + 3, generator=generator).to(torch.int32).numpy()
    table = np.full((len(rows), max(used) + 1), blocks[-1], dtype=np.int32)
    at = 0
    for index, count in enumerate(used):
        table[index, :count] = blocks[at : at + count]
        at += count
    slots = (sum(used) + 3) * block_size
    keys = torch.full((slots, need.kv_heads, need.key_dim), torch.nan, dtype=dtype)
    values = torch.full((slots, need.kv_heads, need.value_dim), torch.nan, dtype=dtype)
    for index, length in enumerate(lengths.tolist()):
        own = torch.from_numpy(table[index].astype(np.int64))[:, None] * block_size + torch.arange(block_size)
        own = own.flatten()
        keys[own[:length]] = torch.randn(length, need.kv_heads, need.key_dim, generator=generator).to(dtype)
        values[own[:length]] = torch.randn(length, need.kv_heads, need.value_dim, generator=generator).to(dtype)
    batch = Batch.of(rows, table, block_size, torch.device("cpu"))
    # As transformers passes it: heads outside tokens in memory.
    tokens = int(batch.host.starts[-1])
    query = torch.randn(need.heads, tokens, need.key_dim, generator=generator).to(dtype).transpose(0, 1)
    sinks = torch.randn(need.heads, generator=generator).to(dtype) if need.has_sinks else None
    call = Call(need.key_dim**-0.5, need.window, need.softcap, sinks)
    return Mix(need, block_size, query, keys, values, batch, call)
