"""Models from disk through the hook: paged, chunked and mixed batches compared with `generate`; and refusals. The other
families are in tests/engine/parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.attention import gather
from pdctl.engine.model.loading import _TOLERANCE, ModelRefused, check_agreement, load_model
from pdctl.engine.model.products import packs
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.schedule.batch import Limits, Slice
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.wire import Manifest

BASE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 199, "max_position_embeddings": 512,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}
LENGTHS = (5, 33, 17, 50)
NEW = 16


def save(kind: str, folder: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**BASE, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(3.0)
    model.save_pretrained(folder)


def reference(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return [
            model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long),
                           max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, len(p):].tolist()
            for p in prompts
        ]  # fmt: skip


def runner_for(folder: Path, blocks: int = 64, block_size: int = 8) -> ModelRunner:
    loaded = load_model(str(folder), torch.device("cpu"), torch.float32)
    manifest = Manifest(loaded.fingerprint, loaded.dtype, block_size, loaded.shapes)
    memory = Memory(block_bytes(manifest) * blocks, "test")
    return ModelRunner(loaded, KvPool(manifest, blocks, memory, torch.device("cpu")), torch.device("cpu"))


def paged(runner: ModelRunner, prompts: list[list[int]], tokens: int, fragment: bool) -> list[list[int]]:
    """All prompts at once with a small budget, so that chunks and decodes share batches."""
    allocator = BlockAllocator(runner.pool.num_blocks)
    if fragment:
        for index in range(runner.pool.num_blocks):
            allocator.allocate(f"hole{index}", 1)
        for index in range(0, runner.pool.num_blocks, 2):
            allocator.free(f"hole{index}")
    scheduler = Scheduler(Limits(4, tokens, 512, runner.pool.block_size, frozenset()), allocator)
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        assert scheduler.add(Sequence(str(index), list(prompt), len(prompt), Sampling(NEW, temperature=0.0))) is None
    while scheduler.has_work:
        batch = scheduler.schedule()
        for token in scheduler.update(batch, *runner.execute(batch)).tokens:
            outputs[token.request_id].append(token.token_id)
    return [outputs[str(index)] for index in range(len(prompts))]


@pytest.mark.parametrize("kind", FAMILIES)
def test_family_equals_generate(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path, FAMILIES[kind])
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 199, (n,), generator=generator).tolist() for n in LENGTHS]
    expected = reference(tmp_path, prompts)
    assert len({token for ids in expected for token in ids}) >= 5, "a model that repeats itself proves nothing"
    runner = runner_for(tmp_path)
    runner.self_check()
    assert paged(runner, prompts, tokens=11, fragment=False) == expected
    assert paged(runner, prompts, tokens=64, fragment=True) == expected
    # As on a GPU: batched decode. Freed blocks are NaN, so reading beyond a sequence's end is detected.
    assert isinstance(runner.backend, gather.GatherBackend)
    runner.backend.pads = True
    runner.self_check()
    runner.pool.poison(list(range(runner.pool.num_blocks)))
    assert paged(runner, prompts, tokens=64, fragment=True) == expected


@pytest.mark.parametrize(
    ("kind", "options"),
    [("bloom", {"n_layer": 4, "n_head": 4}), ("mpt", {"d_model": 64, "n_layers": 4, "n_heads": 4})],
)
def test_a_model_that_does_not_hook_is_refused(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    save(kind, tmp_path, options)
    with pytest.raises(ModelRefused, match="attention hook"):
        load_model(str(tmp_path), torch.device("cpu"), torch.float32)


def test_a_model_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path, {})
    runner = runner_for(tmp_path)
    monkeypatch.setattr(f"{gather.__name__}._first_visible", lambda packed, window: max(0, packed.kv_len - 9))
    with pytest.raises(ModelRefused, match="differ by"):
        runner.self_check()


def test_deep_models_in_half_precision_are_measured_by_their_own_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path, {"num_hidden_layers": 24})
    loaded = load_model(str(tmp_path), torch.device("cpu"), torch.bfloat16)
    manifest = Manifest(loaded.fingerprint, loaded.dtype, 8, loaded.shapes)
    pool = KvPool(manifest, 64, Memory(block_bytes(manifest) * 64, "test"), torch.device("cpu"))
    runner = ModelRunner(loaded, pool, torch.device("cpu"))
    monkeypatch.setitem(_TOLERANCE, torch.bfloat16, 1e-4)  # less than bfloat16 can do
    runner.self_check()
    monkeypatch.setattr(f"{gather.__name__}._first_visible", lambda packed, window: max(0, packed.kv_len - 9))
    with pytest.raises(ModelRefused, match="differ by"):
        runner.self_check()


def test_not_a_number_is_no_agreement() -> None:
    good = torch.ones(2, 3)
    with pytest.raises(ModelRefused):
        check_agreement(torch.full((2, 3), float("nan")), good, "m")


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "nonsense"}', "not json"])
def test_a_directory_that_is_no_model_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelRefused, match="cannot load"):
        load_model(str(tmp_path), torch.device("cpu"), torch.float32)


def test_poisoned_blocks_are_nan_and_the_others_are_not(tmp_path: Path) -> None:
    save("llama", tmp_path, {})
    pool = runner_for(tmp_path, blocks=8).pool
    pool.poison([1, 3])
    for plane in (*pool.keys, *pool.values):
        bad = plane.flatten(1).isnan().all(dim=1).view(8, pool.block_size).all(dim=1)
        assert bad.tolist() == [False, True, False, True, False, False, False, False]
        assert plane[: pool.block_size].isfinite().all()


def test_reading_freed_kv_ends_a_poisoned_engine(tmp_path: Path) -> None:
    """The debug option detects a use after free."""
    save("llama", tmp_path, {})
    runner = runner_for(tmp_path)
    runner.poisoned = True
    sequence = Sequence("a", list(range(12)), 12, Sampling(1), block_ids=[0, 1])
    runner.execute([Slice(sequence, 0, 11, False)])
    runner.pool.poison([0])
    with pytest.raises(AssertionError, match="freed"):
        runner.execute([Slice(sequence, 11, 1, True)])


WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 1024, "tie_word_embeddings": True, "sliding_window": 24,
}  # fmt: skip


def wide_runner(folder: Path, dtype: torch.dtype) -> ModelRunner:
    loaded = load_model(str(folder), torch.device("cpu"), dtype)
    manifest = Manifest(loaded.fingerprint, loaded.dtype, 8, loaded.shapes)
    pool = KvPool(manifest, 64, Memory(block_bytes(manifest) * 64, "test"), torch.device("cpu"))
    return ModelRunner(loaded, pool, torch.device("cpu"))


@pytest.mark.skipif(not packs(torch.float32), reason="this torch has no oneDNN")
def test_a_packed_model_equals_generate_and_holds_its_weights_once(tmp_path: Path) -> None:
    save("mistral", tmp_path, {**WIDE, "tie_word_embeddings": False})
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 1024, (n,), generator=generator).tolist() for n in LENGTHS]
    expected = reference(tmp_path, prompts)
    assert len({token for ids in expected for token in ids}) >= 5
    runner = wide_runner(tmp_path, torch.float32)
    sizes = {name: weight.numel() for name, weight in runner.loaded.module.named_parameters()}
    assert {name.split(".")[-2] for name, size in sizes.items() if size == 0} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    }  # fmt: skip
    runner.self_check()
    assert paged(runner, prompts, tokens=11, fragment=False) == expected
    assert paged(runner, prompts, tokens=64, fragment=True) == expected


@pytest.mark.skipif(not packs(torch.bfloat16), reason="this torch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_gives_a_sequence_the_same_bits_in_every_batch(dtype: torch.dtype, tmp_path: Path) -> None:
    save("gemma3_text", tmp_path, WIDE)
    runner = wide_runner(tmp_path, dtype)
    runner.self_check()
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for index, length in enumerate((5, 33, 17, 50)):
        ids = torch.randint(5, 1024, (length,), generator=generator).tolist()
        sequences.append(
            Sequence(str(index), ids, length, Sampling(1), block_ids=list(range(8 * index, 8 * index + 8)))
        )
    for sequence in sequences:
        runner.logits([Slice(sequence, 0, len(sequence.token_ids) - 1, False)])
    last = [Slice(sequence, len(sequence.token_ids) - 1, 1, True) for sequence in sequences]
    together = runner.logits(last)
    for row, piece in enumerate(last):
        assert torch.equal(runner.logits([piece])[0], together[row])


@pytest.mark.skipif(not packs(torch.bfloat16), reason="this torch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guessed_tokens_have_the_bits_of_decoded_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    save("gemma3_text", tmp_path, WIDE)
    runner = wide_runner(tmp_path, dtype)
    ids = torch.randint(5, 1024, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    sequence = Sequence("a", ids[:40], 40, Sampling(1), block_ids=[3, 1, 2, 0, 7, 6, 5])
    runner.logits([Slice(sequence, 0, 39, False)])
    guessed = runner.logits([Slice(sequence, 39, 1, True, tuple(ids[40:45]))])
    runner.pool.poison([6])
    for row in range(6):
        assert torch.equal(runner.logits([Slice(sequence, 39 + row, 1, True)])[0], guessed[row])
        sequence.token_ids.append(ids[40 + row])


@pytest.mark.skipif(not packs(torch.bfloat16), reason="this torch has no oneDNN")
def test_bfloat16_differs_from_float32_by_rounding_only(tmp_path: Path) -> None:
    save("gemma3_text", tmp_path, WIDE)
    ids = torch.randint(5, 1024, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        runner = wide_runner(tmp_path, dtype)
        sequence = Sequence("a", ids, 60, Sampling(1), block_ids=list(range(8)))
        found.append(runner.logits([Slice(sequence, 0, 60, True)], every_row=True).float())
    assert found[1].isfinite().all()
    assert torch.cosine_similarity(found[0], found[1]).min() > 0.99
