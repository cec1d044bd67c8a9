"""The executor of one device: what it computes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pdctl.engine.executor.single import POISON_ENV, SingleExecutor, _rows
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.loading import ModelRefused
from pdctl.engine.options import EngineOptions, parse
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence

PROMPT = [5, 9, 2, 7, 11, 3]


def options(model: Path, folder: Path, kv_cache_gb: float = 0.001) -> EngineOptions:
    return parse([
        "--name", "e", "--model", str(model), "--port", "1", "--run-dir", str(folder), "--epoch", "e1",
        "--block-size", "4", "--kv-cache-gb", str(kv_cache_gb),
    ])  # fmt: skip


def sequence(blocks: list[int]) -> Sequence:
    return Sequence("r", list(PROMPT), len(PROMPT), Sampling(max_tokens=2), block_ids=blocks)


def test_a_step_computes_the_same_wherever_its_blocks_lie(tiny_model: Path, tmp_path: Path) -> None:
    executor = SingleExecutor.load(options(tiny_model, tmp_path))
    assert executor.poison is None
    found = [executor.execute([Slice(sequence(blocks), 0, len(PROMPT), True)]) for blocks in ([0, 1], [5, 2])]
    assert found[0] == found[1]
    [token], [logprobs] = found[0]
    assert 0 <= token < executor.loaded.vocab_size
    assert logprobs is None
    executor.publish([0, 1])
    assert executor.execute([Slice(sequence([0, 1]), len(PROMPT) - 1, 1, True)])[0] == [token], "KV stays where it is"
    executor.close()


def test_freed_blocks_are_poisoned_only_on_demand(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POISON_ENV, "1")
    executor = SingleExecutor.load(options(tiny_model, tmp_path))
    assert executor.poison is not None
    executor.execute([Slice(sequence([0, 1]), 0, len(PROMPT), True)])
    executor.poison([0])
    with pytest.raises(AssertionError, match="after its blocks were freed"):
        executor.execute([Slice(sequence([0, 1]), len(PROMPT) - 1, 1, True)])
    executor.close()
    torch.set_num_threads(1)


@pytest.mark.parametrize(("attention", "dtype"), [("gather", "float32"), ("native", "bfloat16")])
def test_a_cpu_computes_in_bfloat16_only_with_the_kernel_that_keeps_answers_equal(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str, dtype: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    executor = SingleExecutor.load(replace(options(tiny_model, tmp_path), attention=attention))
    assert executor.manifest.dtype == executor.loaded.dtype == dtype
    assert next(executor.loaded.module.parameters()).dtype is getattr(torch, dtype)
    executor.close()


@pytest.mark.parametrize("ahead", ["true", "false"])
def test_a_step_launched_ahead_gives_the_tokens_of_one_that_waits(tiny_model: Path, tmp_path: Path, ahead: str) -> None:
    """With "true", a thread computes the steps."""
    executor = SingleExecutor.load(replace(options(tiny_model, tmp_path), schedule_ahead=ahead))
    tokens: list[list[int]] = []
    for is_ahead in (False, True):
        computed = [sequence([7 * number + 1, 7 * number]) for number in range(3)]
        [ids, _] = executor.execute([Slice(one, 0, len(PROMPT), True) for one in computed])
        for one, token in zip(computed, ids, strict=True):
            one.token_ids.append(token)
        first = [Slice(one, len(PROMPT), 1, True) for one in computed]
        second = [Slice(one, len(PROMPT) + 1, 1, True) for one in (computed[2], computed[0])]
        launched = executor.launch(first)
        following = executor.launch(second, launched) if is_ahead else None
        found = launched.finish()[0]
        for one, token in zip(computed, found, strict=True):
            one.token_ids.append(token)
        after = following.finish()[0] if following is not None else executor.execute(second)[0]
        tokens.append([*ids, *found, *after])
    assert tokens[0] == tokens[1]
    executor.close()


def test_an_error_of_a_launched_step_is_that_of_its_end(tiny_model: Path, tmp_path: Path) -> None:
    executor = SingleExecutor.load(replace(options(tiny_model, tmp_path), schedule_ahead="true"))
    one = sequence([0, 1])
    one.token_ids.append(10**9)  # no token of this model
    launched = executor.launch([Slice(one, len(PROMPT), 1, True)])
    following = executor.launch([Slice(one, len(PROMPT) + 1, 1, True)], launched)
    for step in (launched, following):
        with pytest.raises((IndexError, RuntimeError)):
            step.finish()
    executor.close()


@pytest.mark.parametrize(("size", "reason"), [(0.0, "for 8 blocks"), (10**6, "does not fit")])
def test_a_pool_that_cannot_be_is_refused(tiny_model: Path, tmp_path: Path, size: float, reason: str) -> None:
    with pytest.raises(ModelRefused, match=reason):
        SingleExecutor.load(options(tiny_model, tmp_path, size))


@pytest.mark.parametrize(
    ("seqs", "speculative", "rows"),
    [
        (16, "", 16),
        (16, '{"kind": "ngram", "tokens": 4}', 80),
        (256, '{"kind": "ngram"}', 512),
        (900, '{"kind": "ngram"}', 900),
    ],
)
def test_graphs_have_room_for_guessed_tokens(tmp_path: Path, seqs: int, speculative: str, rows: int) -> None:
    given = replace(options(tmp_path, tmp_path), max_num_seqs=seqs, speculative=speculative)
    assert _rows(given) == rows
