"""Our own attention in Triton: any block size, number type, head size, window, soft-capping, sinks. See
triton_kernels."""

from __future__ import annotations

import torch
import triton

from pdctl.engine.model.attention import triton_kernels as kernels
from pdctl.engine.model.attention.batch import Batch, Call, LayerNeed, PoolNeed

_LARGEST_HEAD = 512
# Programs that a decode step should have per multiprocessor, if the KV is long enough to split.
_PROGRAMS_PER_UNIT = 4
_MOST_SPLITS = 64
# Tensor cores take at least 16 rows.
_FEWEST = 16
_MOST_ROWS = 128
# In tests: few rows, so that short prompts take several programs.
_INTERPRETED_ROWS = 32


class TritonBackend:
    """See Backend. `units`: multiprocessors of the device. `is_interpreted`: Triton runs on the CPU, for tests."""

    name = "triton"
    is_capturable = True

    def __init__(self, units: int, is_interpreted: bool) -> None:
        self._units = units
        self._is_interpreted = is_interpreted

    def refuses(self, need: LayerNeed, pool: PoolNeed) -> str:
        """See Backend.refuses."""
        largest = max(need.key_dim, need.value_dim)
        if largest > _LARGEST_HEAD:
            return f"heads of {largest} are larger than {_LARGEST_HEAD}"
        return ""

    def begin(self, batch: Batch) -> None:
        """See Backend.begin."""

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, call: Call
    ) -> torch.Tensor:
        """See Backend.attend."""
        query = query if query.stride(2) == 1 else query.contiguous()
        out = query.new_empty(query.shape[0], query.shape[1], values.shape[2])
        if batch.num_single:
            self._decode(query, keys, values, out, batch, call)
        if batch.longest_query > 1:
            self._prefill(query, keys, values, out, batch, call)
        return out

    def _decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        batch: Batch,
        call: Call,
    ) -> None:
        heads, kv_heads, value = query.shape[1], keys.shape[1], values.shape[2]
        group, splits = heads // kv_heads, self._splits(batch.num_sequences * kv_heads)
        parts = query.new_empty(batch.num_sequences, heads, splits, value, dtype=torch.float32)
        logs = query.new_empty(batch.num_sequences, heads, splits, dtype=torch.float32)
        sizes = _sizes(query, values)
        kernels.decode[(batch.num_sequences, kv_heads, splits)](
            query, keys, values, parts, logs, batch.starts, batch.lengths, batch.table,
            call.scale, call.softcap or 0.0,
            *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2], batch.table.stride(0),
            HEADS=heads, GROUP=group, GROUP_PAD=_pad(group), **sizes,
            BLOCK=batch.block_size, TILE=_tile(sizes, query.dtype), SPLITS=splits, WINDOW=call.window or 0,
            SOFTCAP=call.softcap is not None, WIDE=self._is_wide(query), num_warps=4, num_stages=2,
        )  # fmt: skip
        kernels.combine[(batch.num_sequences, heads)](
            parts, logs, out, _or(call.sinks, out), batch.starts, *out.stride()[:2],
            HEADS=heads, VALUE=value, VALUE_PAD=_pad(value), SPLITS=splits, SINKS=call.sinks is not None,
        )  # fmt: skip

    def _prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        batch: Batch,
        call: Call,
    ) -> None:
        tokens, heads = query.shape[:2]
        sizes = _sizes(query, values)
        tile = _tile(sizes, query.dtype)
        rows = _INTERPRETED_ROWS if self._is_interpreted else _rows(tile)
        kernels.prefill[(tokens // rows + batch.num_sequences, heads)](
            query, keys, values, out, _or(call.sinks, out), batch.starts, batch.lengths, batch.table,
            batch.num_sequences, call.scale, call.softcap or 0.0,
            *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2], batch.table.stride(0), *out.stride()[:2],
            GROUP=heads // keys.shape[1], **sizes, BLOCK=batch.block_size, ROWS=rows, TILE=tile,
            WINDOW=call.window or 0, SOFTCAP=call.softcap is not None, SINKS=call.sinks is not None,
            WIDE=self._is_wide(query), num_warps=8 if rows == _MOST_ROWS else 4, num_stages=2,
        )  # fmt: skip

    def _splits(self, programs: int) -> int:
        """Depends only on the size of the batch, so that a CUDA graph splits as a step without one does."""
        wanted = -(-_PROGRAMS_PER_UNIT * self._units // programs)
        return min(_MOST_SPLITS, _next_power(wanted))

    def _is_wide(self, query: torch.Tensor) -> bool:
        # The interpreter multiplies the bit patterns of bfloat16.
        return self._is_interpreted and query.dtype is torch.bfloat16


def open_backend(device: torch.device) -> TritonBackend:
    """See Kind.open_backend."""
    if device.type == "cuda":
        return TritonBackend(torch.cuda.get_device_properties(device).multi_processor_count, is_interpreted=False)
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("it needs a GPU")
    return TritonBackend(units=2, is_interpreted=True)


def _sizes(query: torch.Tensor, values: torch.Tensor) -> dict[str, int]:
    key, value = query.shape[2], values.shape[2]
    return {"KEY": key, "KEY_PAD": _pad(key), "VALUE": value, "VALUE_PAD": _pad(value)}


def _pad(count: int) -> int:
    return max(_FEWEST, _next_power(count))


def _rows(tile: int) -> int:
    """New tokens per program: twice as many as KV tokens, whose tile is loaded again and again."""
    return min(_MOST_ROWS, 2 * tile)


def _next_power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _tile(sizes: dict[str, int], dtype: torch.dtype) -> int:
    """KV tokens per step of a program: keys and values of two such tiles take up to 64 KiB of shared memory."""
    width = max(sizes["KEY_PAD"], sizes["VALUE_PAD"]) * dtype.itemsize
    return max(_FEWEST, min(64, (16 << 10) // width))


def _or(sinks: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel needs some pointer where there are no sinks."""
    return other if sinks is None else sinks
