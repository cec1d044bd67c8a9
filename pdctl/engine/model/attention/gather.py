"""Attention by gathering each sequence's keys and values, then PyTorch's own. Works everywhere: on the CPU the only
backend, on a GPU the last resort, and everywhere the measure of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from pdctl.engine.model.attention.batch import Batch, Call, Ints, LayerNeed, PoolNeed
from pdctl.engine.model.copies import to_device

# Of a piece of a sequence in a layer with a small window.
_FEWEST_ROWS = 64
# Padded KV lengths are multiples of this: kernels and cached memory depend on the shape.
_PAD_TO = 128


@dataclass(slots=True)
class _Packed:
    """Rows [start, start + count) of the batch belong to this sequence; its KV length is then `kv_len`.

    `slots`: the pool slot of each of its tokens, or None if they are the run from `first_slot` on.
    """

    start: int
    count: int
    kv_len: int
    slots: torch.Tensor | None
    first_slot: int


@dataclass(slots=True)
class _Padded:
    """Sequences with one new token each, computed together in a few large operations.

    `rows`: [B], the batch row of each. `slots`: [B, L], the pool slots of its tokens, padded. `lengths`: [B], the
    number of valid slots. `longest`: the largest of `lengths`, on the host."""

    rows: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    longest: int


class GatherBackend:
    """See Backend. `pads`: compute single new tokens together: launches are expensive on a GPU, while on a CPU a view
    of a sequence's KV is free."""

    name = "gather"
    is_capturable = False

    def __init__(self, pads: bool) -> None:
        self.pads = pads
        self._padded: _Padded | None = None
        self._packed: list[_Packed] = []

    def refuses(self, need: LayerNeed, pool: PoolNeed) -> str:
        """See Backend.refuses."""
        return ""

    def begin(self, batch: Batch) -> None:
        """See Backend.begin."""
        starts, lengths, table = batch.host
        counts = starts[1:] - starts[:-1]
        self._padded = _padded(batch) if self.pads and batch.num_single else None
        self._packed = [
            _packed(start, count, kv_len, blocks, batch)
            for start, count, kv_len, blocks in zip(
                starts.tolist(), counts.tolist(), lengths.tolist(), table, strict=False
            )
            if count > 1 or self._padded is None
        ]

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, call: Call
    ) -> torch.Tensor:
        """See Backend.attend."""
        out = query.new_empty(query.shape[0], query.shape[1], values.shape[2])
        if (padded := self._padded) is not None:
            mask = _padded_mask(batch, padded, call.window)
            out[padded.rows] = _attend_padded(query[padded.rows], keys[padded.slots], values[padded.slots], mask, call)
        for packed in self._packed:
            first = _first_visible(packed, call.window)
            seen = _Seen(first, _gather(keys, packed, first), _gather(values, packed, first))
            for piece in _pieces(packed, call.window):
                rows = slice(piece.start, piece.start + piece.count)
                out[rows] = _attend_piece(batch, piece, query[rows], seen, call)
        return out


def open_backend(device: torch.device) -> GatherBackend:
    """See Kind.open_backend."""
    return GatherBackend(pads=device.type == "cuda")


def _packed(start: int, count: int, kv_len: int, blocks: Ints, batch: Batch) -> _Packed:
    size = batch.block_size
    used = blocks[: -(-kv_len // size)]
    first = int(used[0])
    if (used[1:] - used[:-1] == 1).all():
        return _Packed(start, count, kv_len, None, first * size)
    device = batch.write_slots.device
    table = torch.from_numpy(used).to(device, torch.long)[:, None] * size + torch.arange(size, device=device)
    return _Packed(start, count, kv_len, table.flatten()[:kv_len], first * size)


def _padded(batch: Batch) -> _Padded:
    starts, lengths, _ = batch.host
    [single] = (starts[1:] - starts[:-1] == 1).nonzero()
    longest, device, size = int(lengths[single].max()), batch.write_slots.device, batch.block_size
    chosen = to_device(torch.from_numpy(single), device)
    table, own = batch.table[chosen].long(), batch.lengths[chosen].long()
    # Padding repeats the first token, because slots after the last one may contain NaN, which a mask would not remove.
    columns = torch.arange(-(-longest // _PAD_TO) * _PAD_TO, device=device)[None]
    columns = torch.where(columns < own[:, None], columns, 0)
    slots = table.gather(1, columns // size) * size + columns % size
    return _Padded(batch.starts[chosen].long(), slots, own, longest)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows [start, start + count) of the batch; the last of them sees `kv_len` tokens, less those before a window."""

    start: int
    count: int
    kv_len: int


class _Seen(NamedTuple):
    """Keys and values [n, Hk, D] of a sequence's tokens from `first` on."""

    first: int
    keys: torch.Tensor
    values: torch.Tensor


def _pieces(packed: _Packed, window: int | None) -> Iterator[_Piece]:
    """A sequence's rows; in a windowed layer in pieces, so that each sees little more than its window."""
    size = packed.count if window is None else max(_FEWEST_ROWS, window // 2)
    for at in range(0, packed.count, size):
        count = min(size, packed.count - at)
        yield _Piece(packed.start + at, count, packed.kv_len - packed.count + at + count)


def _attend_piece(
    batch: Batch,
    piece: _Piece,
    q: torch.Tensor,
    seen: _Seen,
    call: Call,
) -> torch.Tensor:
    """q [n, H, D] -> [n, H, Dv]."""
    first = _first_visible(piece, call.window)
    tokens = slice(first - seen.first, piece.kv_len - seen.first)
    k, v = seen.keys[tokens], seen.values[tokens]
    if call.softcap is None and call.sinks is None:
        return _sdpa(batch, piece, q, k, v, call)
    return _explicit(q, k, v, _mask(batch, piece, call.window), call)


def _first_visible(packed: _Packed | _Piece, window: int | None) -> int:
    """The oldest token that any row of this sequence may see."""
    return 0 if window is None else max(0, packed.kv_len - packed.count + 1 - window)


def _gather(plane: torch.Tensor, packed: _Packed, first: int) -> torch.Tensor:
    """[kv_len - first, Hk, D]: a view if the slots are one run, else a copy."""
    if packed.slots is None:
        return plane[packed.first_slot + first : packed.first_slot + packed.kv_len]
    return plane.index_select(0, packed.slots[first:])


def _sdpa(
    batch: Batch,
    piece: _Piece,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
) -> torch.Tensor:
    """q [n, H, D], k and v [L, Hk, D] -> [n, H, Dv]."""
    count, heads, size = q.shape
    kv_heads = k.shape[1]
    keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if count == 1:
        # Grouped heads become rows of one query: no expanded copies of K and V.
        folded = q.reshape(1, kv_heads, heads // kv_heads, size)
        return scaled_dot_product_attention(folded, keys, values, scale=call.scale).reshape(1, heads, -1)
    causal = piece.kv_len == count and (call.window is None or count <= call.window)
    mask = None if causal else _mask(batch, piece, call.window)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=causal, scale=call.scale,
        enable_gqa=heads != kv_heads,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _padded_mask(batch: Batch, padded: _Padded, window: int | None) -> torch.Tensor:
    """[B, 1, 1, L], True where the newest token may attend."""
    key = 0 if window is None or padded.longest <= window else window
    if key not in batch.notes:
        columns = torch.arange(padded.slots.shape[1], device=padded.slots.device)[None]
        lengths = padded.lengths[:, None]
        mask = columns < lengths
        batch.notes[key] = (mask & (columns >= lengths - key) if key else mask)[:, None, None]
    return batch.notes[key]


def _attend_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    call: Call,
) -> torch.Tensor:
    """q [B, H, D], k and v [B, L, Hk, D], mask [B, 1, 1, L] -> [B, H, Dv]. Grouped heads become rows of one query."""
    batch, heads, size = q.shape
    kv_heads = k.shape[2]
    folded = q.reshape(batch, kv_heads, heads // kv_heads, size)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if call.softcap is None and call.sinks is None:
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=call.scale)
        return out.reshape(batch, heads, -1)
    scores = folded @ keys.transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    extra = None if call.sinks is None else call.sinks.view(1, kv_heads, -1, 1).expand(batch, -1, -1, 1)
    weights = _weights(scores.masked_fill(~mask, float("-inf")), extra)
    return (weights @ values).reshape(batch, heads, -1)


def _weights(scores: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension; `extra` is an attention sink, which takes weight but adds no value."""
    if extra is None:
        return scores.softmax(-1)
    return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]


def _mask(batch: Batch, piece: _Piece, window: int | None) -> torch.Tensor:
    """[count, kv_len - first visible], True where a row may attend: causal, and within the window. Pieces of the same
    size at other places have the same mask."""
    count, length = piece.count, piece.kv_len - _first_visible(piece, window)
    key = (count, length, window or 0)
    if key not in batch.notes:
        device = batch.write_slots.device
        rows = torch.arange(length - count, length, device=device)[:, None]
        columns = torch.arange(length, device=device)[None]
        mask = columns <= rows
        batch.notes[key] = mask if window is None else mask & (columns > rows - window)
    return batch.notes[key]


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    call: Call,
) -> torch.Tensor:
    """Explicit attention, for logit soft-capping and attention sinks. Shapes as in _sdpa."""
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, wide_k) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    extra = None if call.sinks is None else call.sinks.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    weights = _weights(scores, extra)
    return torch.einsum("hqk,khd->qhd", weights, wide_v)
