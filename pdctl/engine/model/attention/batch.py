"""What a step tells an attention backend: which rows belong to which sequence, and where their KV lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int32]


class LayerNeed(NamedTuple):
    """What a layer needs. `window`: tokens that a row may see, itself included; None for all."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False


class PoolNeed(NamedTuple):
    """The pool that all layers read: its number type and its block size in tokens."""

    dtype: torch.dtype
    block_size: int


class Call(NamedTuple):
    """How one layer computes. `sinks`: [H], logits that take weight but add no value."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class HostRows(NamedTuple):
    """A batch on the host: `starts` [B + 1], the first row of each sequence and the end; `lengths` [B], its KV length
    after the step; `table` [B, W], its blocks."""

    starts: Ints
    lengths: Ints
    table: Ints


@dataclass(slots=True)
class Batch:
    """One step. `write_slots` [T] int64: the slot for each new token's K and V. `starts`, `lengths` and `table`: as
    HostRows, int32, on the device.

    `longest_query` and `longest`: bounds of new tokens and of KV tokens of a sequence. `num_single`: sequences with
    one new token. `is_static`: its tensors are those of a CUDA graph. `notes`: what a backend keeps for the layers of
    this step.
    """

    block_size: int
    write_slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    host: HostRows
    longest_query: int
    longest: int
    num_single: int
    is_static: bool = False
    notes: dict[object, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int]], table: Ints, block_size: int, device: torch.device) -> Batch:
        """A batch that writes nothing, for checks and measurements. `rows`: for each sequence the tokens in the pool
        and the new ones; `table` [B, W]: its blocks. An engine's steps are made by `inputs`."""
        lengths = np.array([before + count for before, count in rows], dtype=np.int32)
        counts = np.array([count for _, count in rows], dtype=np.int32)
        starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        return cls(
            block_size=block_size,
            write_slots=torch.empty(0, dtype=torch.int64, device=device),
            starts=torch.from_numpy(starts).to(device),
            lengths=torch.from_numpy(lengths).to(device),
            table=torch.from_numpy(table).to(device),
            host=HostRows(starts, lengths, table),
            longest_query=int(counts.max()),
            longest=int(lengths.max()),
            num_single=int((counts == 1).sum()),
        )

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch, padding included."""
        return self.lengths.shape[0]
