"""Model families as tiny random models, and what transformers itself answers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.loading import LoadedModel, hook_model
from pdctl.engine.model.sampler import sample

VOCAB = 199
LAYERS = 4
BASE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "max_position_embeddings": 512,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
# Latent attention: a head's keys are wider than its values.
_LATENT: dict[str, Any] = {
    **_ROUTED, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
_WINDOW: dict[str, Any] = {"sliding_window": 8}
# Windows are shorter than the prompts, so that what is outside of them matters.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "ministral": _WINDOW,
    "qwen2": {},
    "qwen3": {},
    "phi": {},
    "phi3": _WINDOW,
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2},
    "gemma": {},
    "gemma2": _WINDOW,
    "gemma3_text": _WINDOW,
    "gemma4_text": {**_WINDOW, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "granite": {},
    "smollm3": {},
    "starcoder2": _WINDOW,
    "glm": {},
    "glm4": {},
    "cohere": {},
    "cohere2": _WINDOW,
    "exaone4": _WINDOW,
    "gpt_neox": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128},
    "stablelm": {},
    "nemotron": {},
    "seed_oss": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "arcee": {},
    "helium": {},
    "apertus": {},
    "mixtral": _LOCAL,
    "granitemoe": _LOCAL,
    "phimoe": _LOCAL,
    "gpt_oss": {**_LOCAL, **_WINDOW},
    "olmoe": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_EXPERTS, "decoder_sparse_step": 1},
    "glm4_moe": _ROUTED,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}
# Initial random weights give nearly flat logits. Scaled ones give output that varies, without which equality means
# little: all weights, or for models that multiply their embeddings all others.
_SCALE = 8.0
_EMBEDDED = ("gemma", "gemma2", "gemma3_text", "gemma4_text")


@dataclass(frozen=True)
class Family:
    """A model behind our hook, and the same weights behind transformers' own attention."""

    kind: str
    loaded: LoadedModel
    plain: Any


def build(kind: str, options: dict[str, Any] | None = None) -> Family:
    """A model of this family with random weights. It is refused (ModelRefused) as at the start of an engine."""
    config = AutoConfig.for_model(kind, **{**BASE, **(FAMILIES[kind] if options is None else options)})
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for name, weights in plain.named_parameters():
            if weights.dim() > 1 and not (kind in _EMBEDDED and "embed" in name):
                weights.mul_(_SCALE)
    return Family(kind, hook_model(copy.deepcopy(plain), kind, frozenset(), f"random {kind}"), plain)


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that our sampler draws."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        [token] = sample(scores, [(self._sampling, input_ids.shape[1])])
        kept = torch.full_like(scores, float("-inf"))
        kept[0, token] = 0.0
        return kept


def expected(family: Family, prompt: list[int], sampling: Sampling) -> list[int]:
    """What transformers' `generate` gives, with a dense cache and eager attention, for one prompt alone."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = family.plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=sampling.max_tokens, do_sample=False,
            pad_token_id=0, logits_processor=LogitsProcessorList([_Drawn(sampling)]),
        )  # fmt: skip
    return [int(token) for token in found[0, len(prompt) :]]
