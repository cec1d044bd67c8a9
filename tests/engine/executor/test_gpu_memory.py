"""The KV's size on a GPU: the arithmetic, and the step that is measured for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdctl.engine.executor.gpu_memory import Usage, kv_bytes, largest_step
from pdctl.engine.model.loading import ModelRefused
from tests.engine.model.test_loading import runner_for, save

GIB = 2**30


def test_kv_gets_what_weights_and_a_step_leave_of_the_share() -> None:
    alone = Usage(total=80 * GIB, free=60 * GIB, weights=16 * GIB, step=3 * GIB)
    assert kv_bytes(alone, 0.9) == (72 - 16 - 3 - 1) * GIB
    assert kv_bytes(alone, 0.5) == (40 - 16 - 3 - 1) * GIB


def test_what_others_hold_is_not_counted_twice_but_never_taken() -> None:
    shared = Usage(total=80 * GIB, free=20 * GIB, weights=16 * GIB, step=3 * GIB)
    assert kv_bytes(shared, 0.45) == (36 - 16 - 3 - 1) * GIB
    assert kv_bytes(shared, 0.9) == (20 - 3 - 1) * GIB


def test_no_room_is_refused_with_the_numbers() -> None:
    with pytest.raises(ModelRefused, match=r"= 0.2 of 80.0 GiB .* weights take 16.0 GiB, a step 4.0 GiB"):
        kv_bytes(Usage(80 * GIB, 60 * GIB, 16 * GIB, 3 * GIB), 0.2)


@pytest.mark.parametrize("seqs", [1, 3, 16, 300])
@pytest.mark.parametrize("tokens", [16, 100, 512])
@pytest.mark.parametrize("longest", [20, 4096])
def test_the_largest_step_has_all_tokens_and_rows(seqs: int, tokens: int, longest: int) -> None:
    batch = largest_step(seqs, tokens, longest, 16)
    total = sum(piece.count for piece in batch)
    assert len(batch) == min(seqs, tokens)
    assert total <= tokens
    assert total == tokens or len(batch) * (longest - 1) <= tokens or total >= tokens - len(batch)
    for piece in batch:
        assert piece.samples
        assert piece.count <= min(longest, len(piece.sequence.block_ids) * 16)


def test_it_runs_over_a_pool_with_the_blocks_of_one_sequence(tmp_path: Path) -> None:
    save("llama", tmp_path, {})
    runner = runner_for(tmp_path, blocks=8, block_size=8)
    chosen, _ = runner.execute(largest_step(4, 64, 61, 8))
    assert len(chosen) == 4
