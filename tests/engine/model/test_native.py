"""Attention by the compiled kernel: right, and the same bits however tokens are put into steps."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model import native
from pdctl.engine.model.attention import open_backend
from pdctl.engine.model.attention.batch import Batch, Call, LayerNeed, PoolNeed
from pdctl.engine.model.attention.choice import check, choose
from pdctl.engine.model.products import packs
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence
from tests.engine.model.test_deterministic import WIDE, runner_for
from tests.engine.model.test_loading import save

CPU = torch.device("cpu")
BLOCK = 16
NEEDS = [
    LayerNeed(4, 1, 256, 256),
    LayerNeed(4, 1, 256, 256, 512),
    LayerNeed(8, 2, 64, 64, 33, 20.0),
    LayerNeed(4, 4, 48, 32, None, None, True),
    LayerNeed(3, 1, 80, 80, 1),
    LayerNeed(9, 3, 16, 64, 7, None, True),
    LayerNeed(24, 1, 128, 128),
]


compiled = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_it_agrees_with_gather(need: LayerNeed, dtype: torch.dtype) -> None:
    for block_size in (1, 16, 128):
        pool = PoolNeed(dtype, block_size)
        backend = open_backend("native", CPU)
        assert backend.refuses(need, pool) == ""
        check(backend, need, pool, CPU)


def step(query: torch.Tensor, pieces: list[tuple[int, int]], blocks: list[list[int]]) -> tuple[Batch, torch.Tensor]:
    """A batch with these (start, count) of sequences, and its packed queries of query[sequence, token]."""
    batch = Batch.of(pieces, np.array(blocks, dtype=np.int32), BLOCK, CPU)
    return batch, torch.cat([query[number, at : at + count] for number, (at, count) in enumerate(pieces)])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_a_row_has_the_same_bits_in_every_step(need: LayerNeed, dtype: torch.dtype) -> None:
    """As part of a whole prompt, of chunks of any size beside other sequences, and alone."""
    chance, numbers = random.Random(str(need)), torch.Generator().manual_seed(3)
    tokens, blocks = 200, list(range(2 * 13))
    chance.shuffle(blocks)
    tables = [blocks[:13], blocks[13:]]

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers).to(dtype)

    query = some(2, tokens, need.heads, need.key_dim)
    keys = some(26 * BLOCK, need.kv_heads, need.key_dim)
    values = some(26 * BLOCK, need.kv_heads, need.value_dim)
    sinks = some(need.heads) if need.has_sinks else None
    call = Call(need.key_dim**-0.5, need.window, need.softcap, sinks)
    backend = open_backend("native", CPU)

    def attend(pieces: list[tuple[int, int]], of: list[list[int]]) -> torch.Tensor:
        batch, packed = step(query, pieces, of)
        backend.begin(batch)
        return backend.attend(packed, keys, values, batch, call)

    whole = attend([(0, tokens)], tables[:1])
    for most in (1, 3, 70):
        at = 0
        while at < tokens:
            count = min(tokens - at, chance.randint(1, most))
            other = (chance.randint(0, 100), chance.randint(1, 80))
            found = attend([(at, count), other], tables)[:count]
            assert torch.equal(found, whole[at : at + count]), f"token {at}, {count} at once"
            at += count


@compiled
def test_a_row_does_not_read_what_it_may_not_see() -> None:
    need = LayerNeed(4, 2, 64, 64, 40)
    query = torch.randn(1, 150, 4, 64)
    keys, values = torch.randn(11 * BLOCK, 2, 64), torch.randn(11 * BLOCK, 2, 64)
    call, backend = Call(0.125, need.window), open_backend("native", CPU)
    batch, packed = step(query, [(100, 50)], [list(range(10))])
    backend.begin(batch)
    expected = backend.attend(packed, keys, values, batch, call)
    for unseen in (slice(0, 61), slice(150, None)):
        keys[unseen] = values[unseen] = torch.nan
    assert torch.equal(backend.attend(packed, keys, values, batch, call), expected)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), [("qwen3", {}), ("gemma3_text", {"sliding_window": 48})])
def test_a_token_has_the_same_logits_in_every_step(
    kind: str, options: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    """A whole model with packed weights: what is computed again after a failover has the bits of the first time."""
    if not packs(dtype):
        pytest.skip(f"products in {dtype} round by batch on this CPU")
    chance = random.Random(7)
    save(kind, tmp_path, WIDE | options)
    runner = runner_for(tmp_path, dtype, open_backend("native", CPU))
    ids = [chance.randint(5, 500) for _ in range(180)]

    def sequence(first: int) -> Sequence:
        return Sequence("s", ids, len(ids), Sampling(1), block_ids=list(range(first, first + 12)))

    whole = runner.logits([Slice(sequence(0), 0, len(ids), True)], every_row=True)
    again, at = sequence(20), 0
    while at < len(ids):
        count = min(len(ids) - at, chance.choice((1, 1, 2, 9, 60)))
        batch = [Slice(again, at, count, True), Slice(sequence(40), 0, chance.randint(1, 40), True)]
        found = runner.logits(batch, every_row=True)[:count]
        assert torch.equal(found, whole[at : at + count]), f"token {at}, {count} at once"
        at += count


@compiled
def test_what_it_cannot_do() -> None:
    backend = open_backend("native", CPU)
    assert "float16" in backend.refuses(LayerNeed(4, 1, 64, 64), PoolNeed(torch.float16, BLOCK))
    assert "multiple" in backend.refuses(LayerNeed(4, 1, 60, 64), PoolNeed(torch.float32, BLOCK))
    assert "up to 256" in backend.refuses(LayerNeed(4, 1, 64, 512), PoolNeed(torch.float32, BLOCK))
    torch.set_num_threads(2)
    assert "one thread" in backend.refuses(LayerNeed(4, 1, 64, 64), PoolNeed(torch.float32, BLOCK))
    with pytest.raises(RuntimeError, match="on CPUs"):
        open_backend("native", torch.device("meta"))


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native.library.cache_clear()
    monkeypatch.setenv("PDCTL_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize(
    ("compiler", "said"), [("", "no C++ compiler"), ("exit 1", "failed"), ("true", "cannot be used")]
)
def test_without_a_compiler_that_works_gather_computes(
    compiler: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    if compiler:
        # `true` writes no library.
        (folder / "g++").write_text(f"#!/bin/sh\n{compiler}\n")
        (folder / "g++").chmod(0o755)
    chosen = choose("auto", NEEDS[:1], PoolNeed(torch.float32, BLOCK), CPU)
    assert chosen.backend.name == "gather"
    assert said in chosen.reason
    native.library.cache_clear()


@compiled
@pytest.mark.usefixtures("_uncompiled")
def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native.library()
    (found,) = (tmp_path / "kernels").glob("*.so")
    before = found.stat().st_mtime_ns
    native.library.cache_clear()
    native.library()
    assert found.stat().st_mtime_ns == before
    native.library.cache_clear()


@compiled
@pytest.mark.usefixtures("_uncompiled")
def test_a_damaged_library_is_compiled_again(tmp_path: Path) -> None:
    native.library()
    (found,) = (tmp_path / "kernels").glob("*.so")
    whole = found.read_bytes()
    found.unlink()
    found.write_bytes(whole[: len(whole) // 2])
    native.library.cache_clear()
    assert native.library().pdctl_width() in (8, 16)
    native.library.cache_clear()
