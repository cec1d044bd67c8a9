"""Paged attention behind transformers' AttentionInterface.

Model code calls `attend` with rotated q, k, v of all packed tokens. `attend` writes k and v to the pool and computes
attention for each sequence over its own blocks. Metadata is passed in a module global, because some models drop keyword
arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from pdctl.engine.cache.kv_pool import KvPool

NAME = "pdctl"
# Of a piece of a sequence in a layer with a small window.
_FEWEST_ROWS = 64


@dataclass(slots=True)
class PackedSequence:
    """Rows [start, start + count) of the batch belong to this sequence; its KV length is then `kv_len`.

    `slots`: the pool slot of each of its tokens; `first_slot` is set if they form one contiguous run.
    """

    start: int
    count: int
    kv_len: int
    slots: torch.Tensor
    first_slot: int | None


@dataclass(slots=True)
class PaddedRows:
    """Sequences with one new token each, computed together in a few large operations, for GPUs.

    `rows`: [B], the batch row of each. `slots`: [B, L], the pool slots of its tokens, padded. `lengths`: [B], the
    number of valid slots. `longest`: the largest of `lengths`, on the host."""

    rows: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    longest: int
    masks: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class BatchContext:
    """One step. `write_slots`: [tokens], the slot for each token's K and V. A sequence is either packed or padded."""

    pool: KvPool
    write_slots: torch.Tensor
    sequences: list[PackedSequence]
    padded: PaddedRows | None = None
    masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)


class HookCall(NamedTuple):
    """What a layer asks for, with the mask that transformers made for it, if any."""

    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    mask: torch.Tensor | None


class HookLog:
    """Records which layers call the hook, with which shapes, instead of computing. For the check at load."""

    def __init__(self) -> None:
        self.calls: list[HookCall] = []


_current: BatchContext | HookLog | None = None


def set_context(context: BatchContext | HookLog | None) -> None:
    """Set the context of the next forward pass."""
    global _current
    _current = context


def register() -> None:
    """Register `attn_implementation="pdctl"`. Models make no mask for it; masking is done here."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    # cuDNN makes a plan for each new shape, and the KV length changes in each step: 4 ms per layer (H200, torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The hook. query [1, H, T, D], key and value [1, Hk, T, D]; returns [1, T, H, Dv]."""
    assert _current is not None, "a forward pass without a batch context"
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    layer = int(str(module.layer_idx))
    if isinstance(_current, HookLog):
        called = HookCall(layer, k.shape[1], k.shape[2], v.shape[2], sliding_window, attention_mask)
        _current.calls.append(called)
        return q.new_zeros(1, q.shape[0], q.shape[1], v.shape[2]), None
    context = _current
    keys, values = context.pool.keys[layer], context.pool.values[layer]
    keys.index_copy_(0, context.write_slots, k)
    values.index_copy_(0, context.write_slots, v)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    if (padded := context.padded) is not None:
        mask = _padded_mask(padded, sliding_window)
        seen_k, seen_v = keys[padded.slots], values[padded.slots]
        out[padded.rows] = _attend_padded(q[padded.rows], seen_k, seen_v, scale, mask, softcap, s_aux)
    for packed in context.sequences:
        first = _first_visible(packed, sliding_window)
        seen = _Seen(first, _gather(keys, packed, first), _gather(values, packed, first))
        for piece in _pieces(packed, sliding_window):
            rows = slice(piece.start, piece.start + piece.count)
            out[rows] = _attend_piece(context, piece, q[rows], seen, scale, sliding_window, softcap, s_aux)
    return out[None], None


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


def _pieces(packed: PackedSequence, window: int | None) -> Iterator[_Piece]:
    """A sequence's rows; in a windowed layer in pieces, so that each sees little more than its window."""
    size = packed.count if window is None else max(_FEWEST_ROWS, window // 2)
    for at in range(0, packed.count, size):
        count = min(size, packed.count - at)
        yield _Piece(packed.start + at, count, packed.kv_len - packed.count + at + count)


def _attend_piece(
    context: BatchContext,
    piece: _Piece,
    q: torch.Tensor,
    seen: _Seen,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [n, H, D] -> [n, H, Dv]."""
    first = _first_visible(piece, window)
    tokens = slice(first - seen.first, piece.kv_len - seen.first)
    k, v = seen.keys[tokens], seen.values[tokens]
    if softcap is None and sinks is None:
        return _sdpa(context, piece, q, k, v, scale, window)
    return _explicit(q, k, v, scale, _mask(context, piece, window), softcap, sinks)


def _first_visible(packed: PackedSequence | _Piece, window: int | None) -> int:
    """The oldest token that any row of this sequence may see."""
    return 0 if window is None else max(0, packed.kv_len - packed.count + 1 - window)


def _gather(plane: torch.Tensor, packed: PackedSequence, first: int) -> torch.Tensor:
    """[kv_len - first, Hk, D]: a view if the slots are one run, else a copy."""
    if packed.first_slot is not None:
        return plane[packed.first_slot + first : packed.first_slot + packed.kv_len]
    return plane.index_select(0, packed.slots[first:])


def _sdpa(
    context: BatchContext,
    piece: _Piece,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """q [n, H, D], k and v [L, Hk, D] -> [n, H, Dv]."""
    count, heads, size = q.shape
    kv_heads = k.shape[1]
    keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if count == 1:
        # Grouped heads become rows of one query: no expanded copies of K and V.
        folded = q.reshape(1, kv_heads, heads // kv_heads, size)
        return scaled_dot_product_attention(folded, keys, values, scale=scale).reshape(1, heads, -1)
    causal = piece.kv_len == count and (window is None or count <= window)
    mask = None if causal else _mask(context, piece, window)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=causal, scale=scale,
        enable_gqa=heads != kv_heads,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _padded_mask(padded: PaddedRows, window: int | None) -> torch.Tensor:
    """[B, 1, 1, L], True where the newest token may attend."""
    key = 0 if window is None or padded.longest <= window else window
    if key not in padded.masks:
        columns = torch.arange(padded.slots.shape[1], device=padded.slots.device)[None]
        lengths = padded.lengths[:, None]
        mask = columns < lengths
        padded.masks[key] = (mask & (columns >= lengths - key) if key else mask)[:, None, None]
    return padded.masks[key]


def _attend_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [B, H, D], k and v [B, L, Hk, D], mask [B, 1, 1, L] -> [B, H, Dv]. Grouped heads become rows of one query."""
    batch, heads, size = q.shape
    kv_heads = k.shape[2]
    folded = q.reshape(batch, kv_heads, heads // kv_heads, size)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(batch, heads, -1)
    scores = folded @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    extra = None if sinks is None else sinks.view(1, kv_heads, -1, 1).expand(batch, -1, -1, 1)
    weights = _weights(scores.masked_fill(~mask, float("-inf")), extra)
    return (weights @ values).reshape(batch, heads, -1)


def _weights(scores: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension; `extra` is an attention sink, which takes weight but adds no value."""
    if extra is None:
        return scores.softmax(-1)
    return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]


def _mask(context: BatchContext, piece: _Piece, window: int | None) -> torch.Tensor:
    """[count, kv_len - first visible], True where a row may attend: causal, and within the window. Pieces of the same
    size at other places have the same mask."""
    count, length = piece.count, piece.kv_len - _first_visible(piece, window)
    key = (count, length, window or 0)
    if key not in context.masks:
        device = context.write_slots.device
        rows = torch.arange(length - count, length, device=device)[:, None]
        columns = torch.arange(length, device=device)[None]
        mask = columns <= rows
        context.masks[key] = mask if window is None else mask & (columns > rows - window)
    return context.masks[key]


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Explicit attention, for logit soft-capping and attention sinks. Shapes as in _sdpa."""
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, wide_k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    extra = None if sinks is None else sinks.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    weights = _weights(scores, extra)
    return torch.einsum("hqk,khd->qhd", weights, wide_v)
