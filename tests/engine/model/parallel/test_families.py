"""Model families by several ranks: what the parts compute together is what the whole model computes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from pdctl.engine.model.loading import forward
from pdctl.engine.model.parallel.plan import CannotSplit
from pdctl.engine.model.parallel.weights import load_part
from tests.engine.model.parallel.threads import ranks, together
from tests.engine.parity.families import FAMILIES, VOCAB, build

TOKENS = 24
REFUSED = {"gpt2", "gpt_bigcode", "opt", "stablelm", "hunyuan_v1_dense", "granitemoe", "phimoe", "gpt_oss"}
# With two KV heads, so that two ranks have each; heads that are gathered; experts; latent attention; tied embeddings.
BY_FOUR = ["llama", "phi3", "olmo2", "qwen3_moe", "deepseek_v3", "gemma3_text"]


@pytest.mark.parametrize(("kind", "size"), [(kind, 2) for kind in FAMILIES] + [(kind, 4) for kind in BY_FOUR])
def test_ranks_compute_what_the_whole_model_computes(kind: str, size: int, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    plain = build(kind).plain
    plain.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    if kind in REFUSED:
        with pytest.raises(CannotSplit, match="no plan that splits its layers"):
            load_part(tmp_path, config, torch.float32, ranks(size)[0])
        return
    parts = [load_part(tmp_path, config, torch.float32, rank).eval() for rank in ranks(size)]
    for part in parts:
        part.set_attn_implementation("eager")  # type: ignore[operator]
    ids, positions = torch.arange(TOKENS) * 31 % VOCAB, torch.arange(TOKENS)
    expected = forward(plain, ids, positions, positions)
    for found in together([partial(forward, part, ids, positions, positions) for part in parts]):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    whole, most = sum(w.numel() for w in plain.parameters()), max(sum(w.numel() for w in p.parameters()) for p in parts)
    assert most < (0.65 if size == 2 else 0.5) * whole, "a rank has its part only"


# All of their layers need the embeddings.
NEED_EMBEDDINGS = {"gemma4_text"}


# Layers of several kinds; shared experts; scaled and tied embeddings; positions that are learned. The others are slow.
STAGED = {"llama", "gemma3_text", "gemma4_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "gpt2", "opt"}


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(pytest.param(kind, 1, marks=() if kind in STAGED else pytest.mark.slow) for kind in FAMILIES),
        ("llama", 2),
        ("gemma3_text", 2),
    ],
)
def test_stages_compute_what_the_whole_model_computes(kind: str, size: int, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    plain = build(kind).plain
    plain.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    stages = int(config.num_hidden_layers)
    parts = [load_part(tmp_path, config, torch.float32, rank).eval() for rank in ranks(size, stages)]
    for part in parts:
        part.set_attn_implementation("eager")  # type: ignore[operator]
    ids, positions = torch.arange(TOKENS) * 31 % VOCAB, torch.arange(TOKENS)
    expected = forward(plain, ids, positions, positions)
    found = together([partial(forward, part, ids, positions, positions) for part in parts])
    if kind in NEED_EMBEDDINGS:
        assert not any(torch.isfinite(logits).any() for logits in found[:size]), "the check at load refuses it"
        return
    for logits in found[:size]:
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    whole = sum(weight.numel() for weight in plain.parameters())
    assert all(sum(weight.numel() for weight in part.parameters()) < whole for part in parts)
    others = [weight for part in parts[size:] for weight in part.parameters()]
    assert not any(VOCAB in weight.shape for weight in others), "only the first stage has the vocabulary"


def test_more_stages_than_layers_are_refused(tmp_path: Path) -> None:
    build("llama").plain.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(CannotSplit, match=r"its \d+ layers cannot be shared by 99 stages"):
        load_part(tmp_path, config, torch.float32, ranks(1, 99)[0])


def test_models_that_ranks_cannot_share_are_refused(tmp_path: Path) -> None:
    build("llama").plain.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(CannotSplit, match="4 attention heads and 2 KV heads cannot be shared by 3 ranks"):
        load_part(tmp_path, config, torch.float32, ranks(3)[0])
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CannotSplit, match="quantized"):
        load_part(tmp_path, config, torch.float32, ranks(2)[0])


def test_a_weight_that_is_missing_is_noticed(tmp_path: Path) -> None:
    build("llama").plain.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CannotSplit, match=r"lack 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_part(tmp_path, AutoConfig.from_pretrained(tmp_path), torch.float32, ranks(2)[1])


@pytest.mark.parametrize(("kind", "dtype"), [("deepseek_v3", torch.bfloat16), ("llama", torch.float16)])
def test_weights_have_the_types_that_transformers_gives_them(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build(kind).plain.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    part = load_part(tmp_path, AutoConfig.from_pretrained(tmp_path), dtype, ranks(2)[0])
    expected = {name: weight.dtype for name, weight in whole.state_dict().items()}
    assert {name: weight.dtype for name, weight in part.state_dict().items()} == expected
