"""Attention over the paged pool against one masked product over all tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.attention import gather, hook, open_backend
from pdctl.engine.model.inputs import InputBuffers
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence
from pdctl.wire import LayerShape, Manifest

HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS = 4, 2, 16, 8, 64


class Layer(torch.nn.Module):
    layer_idx = 0


@pytest.fixture(autouse=True)
def no_context() -> Iterator[None]:
    with torch.inference_mode():
        yield
    hook.set_context(None)


def pool(dtype: str) -> KvPool:
    manifest = Manifest("m", dtype, BLOCK, [LayerShape(KV_HEADS, SIZE, SIZE)])
    made = KvPool(manifest, BLOCKS, Memory(block_bytes(manifest) * BLOCKS, "test"), torch.device("cpu"))
    made.poison(list(range(BLOCKS)))
    return made


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """[L, H, D], in float64, with an L x L mask."""
    count = q.shape[0]
    rows, columns = torch.arange(count)[:, None], torch.arange(count)[None]
    mask = (columns <= rows) if window is None else (columns <= rows) & (columns > rows - window)
    each = (q.double().transpose(0, 1)[None], k.double().transpose(0, 1)[None], v.double().transpose(0, 1)[None])
    return scaled_dot_product_attention(*each, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def chunked(
    cuts: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scattered: bool
) -> torch.Tensor:
    """The same by `attend`, chunk by chunk; a second, short sequence is in every batch."""
    made = pool(str(q.dtype).removeprefix("torch."))
    backend = open_backend("gather", torch.device("cpu"))
    blocks = (torch.randperm(BLOCKS - 1) if scattered else torch.arange(BLOCKS - 1)).tolist()
    buffers = InputBuffers(BLOCK, torch.device("cpu"))
    short = Sequence("short", [7], 1, Sampling(1), block_ids=[BLOCKS - 1])
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(q)], strict=True):
        own = Sequence("own", list(range(len(q))), len(q), Sampling(1), block_ids=blocks[: -(-end // BLOCK)])
        batch = buffers.build([Slice(short, 0, 1, True), Slice(own, start, end - start, False)]).batch
        backend.begin(batch)
        hook.set_context(hook.Step(made, backend, batch))
        query, key, value = (torch.cat([part[:1], part[start:end]]).transpose(0, 1)[None] for part in (q, k, v))
        out, _ = hook.attend(Layer(), query, key, value, None, sliding_window=window)
        # The short sequence sees one token: its value, for both heads of a group.
        assert torch.allclose(out[0, 0].float(), v[0].repeat_interleave(HEADS // KV_HEADS, 0).float(), atol=1e-2)
        found.append(out[0, 1:])
    return torch.cat(found)


@pytest.mark.parametrize("seed", range(24))
def test_pieces_equal_one_masked_product(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    monkeypatch.setattr(gather, "_FEWEST_ROWS", number(1, 8))
    length, window = number(2, 400), [None, number(1, 450), number(1, 40)][seed % 3]
    cuts = sorted({number(1, length - 1) for _ in range(number(0, 4))})
    dtype = torch.bfloat16 if seed % 8 == 7 else torch.float32
    q = torch.randn(length, HEADS, SIZE, generator=generator).to(dtype)
    k, v = torch.randn(2, length, KV_HEADS, SIZE, generator=generator).to(dtype)
    found = chunked(cuts, q, k, v, window, scattered=seed % 2 == 0)
    worst = float((found.double() - expected(q, k, v, window)).abs().max())
    assert worst < (1e-5 if dtype is torch.float32 else 3e-2), (length, window, cuts)


def test_no_mask_of_a_windowed_layer_grows_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_FEWEST_ROWS", 4)
    q, k, v = torch.randn(400, HEADS, SIZE), torch.randn(400, KV_HEADS, SIZE), torch.randn(400, KV_HEADS, SIZE)
    seen: list[tuple[int, ...]] = []
    kept = gather._mask

    def note(*args: object) -> torch.Tensor:
        mask = kept(*args)  # type: ignore[arg-type]
        seen.append(tuple(mask.shape))
        return mask

    monkeypatch.setattr(gather, "_mask", note)
    chunked([], q, k, v, 16, scattered=False)
    assert len(seen) == 49
    assert max(rows for rows, _ in seen) == 8
    assert max(columns for _, columns in seen) == 8 + 16 - 1
