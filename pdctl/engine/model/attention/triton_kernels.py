"""Paged attention kernels in Triton.

Flash attention (Dao et al. 2022) with an online softmax in base 2; decoding splits a sequence's KV among programs and
combines their parts by log-sum-exp (flash decoding, Dao et al. 2023). Slots that no row may see are never loaded: they
may hold NaN, which a mask would not remove.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Triton compiles a kernel anew for arguments that are 1 or multiples of 16. These change from step to step, and a step
# must not wait for a compiler.
_kernel = partial(
    triton.jit,
    do_not_specialize=["num_sequences", "table_row"],
    do_not_specialize_on_alignment=["starts", "lengths", "table"],
)


@triton.jit
def _scores(q, k, scale, softcap, SOFTCAP: tl.constexpr, WIDE: tl.constexpr):
    """q [M, D] and k [D, N] -> logits [M, N] in base 2. WIDE: compute in float32, for Triton's interpreter."""
    if WIDE:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if SOFTCAP:
        # tanh(x) = 2 sigmoid(2 x) - 1
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores * LOG2E


@triton.jit
def _weigh(acc, total, best, scores, v, WIDE: tl.constexpr):
    """One step of the online softmax. `best`, `total` [M]: the largest logit so far, the sum of weights relative to
    it. Rows that have seen nothing have best = -inf."""
    new_best = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(best - base)
    total = total * fade + tl.sum(weights, 1)
    if WIDE:
        part = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
    else:
        part = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc * fade[:, None] + part, total, new_best


@triton.jit
def _load_kv(
    keys, values, table, tokens, seen, head, k_slot, k_head, v_slot, v_head,
    KEY: tl.constexpr, KEY_PAD: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys [KEY_PAD, N] and values [N, VALUE_PAD] of a sequence's `tokens` where `seen`, else 0."""
    blocks = tl.load(table + tokens // BLOCK, mask=seen, other=0).to(tl.int64)
    slots = blocks * BLOCK + tokens % BLOCK
    key_dims, value_dims = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    k = tl.load(
        keys + head * k_head + slots[None] * k_slot + key_dims[:, None],
        mask=seen[None] & (key_dims < KEY)[:, None],
        other=0.0,
    )
    v = tl.load(
        values + head * v_head + slots[:, None] * v_slot + value_dims[None],
        mask=seen[:, None] & (value_dims < VALUE)[None],
        other=0.0,
    )
    return k, v


@_kernel
def decode(
    query, keys, values, parts, part_logs, starts, lengths, table, scale, softcap,
    q_row, q_head, k_slot, k_head, v_slot, v_head, table_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    KEY: tl.constexpr, KEY_PAD: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One split of one sequence with one new token, for the query heads of one KV head.

    Grid (B, Hk, SPLITS). Writes `parts` [B, H, SPLITS, Dv], normalised, and `part_logs` [B, H, SPLITS], the base-2
    log-sum-exp, -inf for an empty split. Sequences with more new tokens are left to `prefill`."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(starts + sequence)
    if tl.load(starts + sequence + 1) - row != 1:
        return
    length = tl.load(lengths + sequence)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    base = first // TILE * TILE
    share = tl.cdiv(length - base, SPLITS * TILE) * TILE
    begin = base + split * share
    end = tl.minimum(begin + share, length)
    group, key_dims, value_dims = tl.arange(0, GROUP_PAD), tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    heads = kv_head * GROUP + group
    q = tl.load(
        query + row.to(tl.int64) * q_row + heads[:, None] * q_head + key_dims[None],
        mask=(group < GROUP)[:, None] & (key_dims < KEY)[None],
        other=0.0,
    )
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    own_table = table + sequence.to(tl.int64) * table_row
    for at in range(begin, end, TILE):
        tokens = at + tl.arange(0, TILE)
        seen = (tokens >= first) & (tokens < length)
        k, v = _load_kv(
            keys, values, own_table, tokens, seen, kv_head, k_slot, k_head, v_slot, v_head,
            KEY, KEY_PAD, VALUE, VALUE_PAD, BLOCK,
        )  # fmt: skip
        scores = tl.where(seen[None], _scores(q, k, scale, softcap, SOFTCAP, WIDE), float("-inf"))
        acc, total, best = _weigh(acc, total, best, scores, v, WIDE)
    some = total > 0
    total = tl.where(some, total, 1.0)
    place = (sequence.to(tl.int64) * HEADS + heads) * SPLITS + split
    tl.store(part_logs + place, tl.where(some, best + tl.log2(total), float("-inf")), mask=group < GROUP)
    tl.store(
        parts + place[:, None] * VALUE + value_dims[None],
        acc / total[:, None],
        mask=(group < GROUP)[:, None] & (value_dims < VALUE)[None],
    )


@_kernel
def combine(
    parts, part_logs, out, sinks, starts, out_row, out_head,
    HEADS: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The splits of one head of one sequence with one new token become its output. Grid (B, H)."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(starts + sequence)
    if tl.load(starts + sequence + 1) - row != 1:
        return
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, VALUE_PAD)
    place = (sequence.to(tl.int64) * HEADS + head) * SPLITS + splits
    logs = tl.load(part_logs + place)
    best = tl.max(logs, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        best = tl.maximum(best, sink)
    weights = tl.exp2(logs - best)
    total = tl.sum(weights, 0)
    if SINKS:
        total += tl.exp2(sink - best)
    part = tl.load(parts + place[:, None] * VALUE + dims[None], mask=(dims < VALUE)[None], other=0.0)
    found = tl.sum(part * weights[:, None], 0) / total
    where = out + row.to(tl.int64) * out_row + head * out_head + dims
    tl.store(where, found.to(out.dtype.element_ty), mask=dims < VALUE)


@_kernel
def prefill(
    query, keys, values, out, sinks, starts, lengths, table, num_sequences, scale, softcap,
    q_row, q_head, k_slot, k_head, v_slot, v_head, table_row, out_row, out_head,
    GROUP: tl.constexpr, KEY: tl.constexpr, KEY_PAD: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS new tokens of one sequence, for one query head. Grid (T // ROWS + B, H).

    Sequence s starts with program starts[s] // ROWS + s, so that no list of programs is needed; those between two
    sequences do nothing. Sequences with one new token are left to `decode`."""
    program, head = tl.program_id(0), tl.program_id(1)
    low, high = 0, num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // ROWS + middle <= program:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    offset = (program - start // ROWS - sequence) * ROWS
    if (count == 1) | (offset >= count):
        return
    context = tl.load(lengths + sequence) - count
    rows = offset + tl.arange(0, ROWS)
    key_dims, value_dims = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    q = tl.load(
        query + (start + rows).to(tl.int64)[:, None] * q_row + head * q_head + key_dims[None],
        mask=(rows < count)[:, None] & (key_dims < KEY)[None],
        other=0.0,
    )
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        best = tl.zeros([ROWS], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    end = context + tl.minimum(offset + ROWS, count)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context + offset + 1 - WINDOW, 0)
    positions = context + rows
    own_table = table + sequence.to(tl.int64) * table_row
    for at in range(begin // TILE * TILE, end, TILE):
        tokens = at + tl.arange(0, TILE)
        k, v = _load_kv(
            keys, values, own_table, tokens, (tokens >= begin) & (tokens < end), head // GROUP,
            k_slot, k_head, v_slot, v_head, KEY, KEY_PAD, VALUE, VALUE_PAD, BLOCK,
        )  # fmt: skip
        seen = tokens[None] <= positions[:, None]
        if WINDOW > 0:
            seen = seen & (tokens[None] > positions[:, None] - WINDOW)
        scores = tl.where(seen, _scores(q, k, scale, softcap, SOFTCAP, WIDE), float("-inf"))
        acc, total, best = _weigh(acc, total, best, scores, v, WIDE)
    where = out + (start + rows).to(tl.int64)[:, None] * out_row + head * out_head + value_dims[None]
    # Rows after the last one may have seen nothing; they are not stored.
    found = (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(where, found, mask=(rows < count)[:, None] & (value_dims < VALUE)[None])
