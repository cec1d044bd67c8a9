"""Models of known shapes with random weights, created on the device: nothing is downloaded or written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Qwen3-0.6B and Qwen3-8B, by their published config.json.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.6B": (
        "qwen3",
        {
            "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
            "max_position_embeddings": 40960,
        },
    ),
    "8B": (
        "qwen3",
        {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
            "max_position_embeddings": 40960,
        },
    ),
    # For a trial on a CPU.
    "tiny": (
        "qwen3",
        {
            "vocab_size": 384, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 16384,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """A model and its cost: `bytes_read` by a decode step, `matrix_params` used for each token."""

    module: torch.nn.Module
    bytes_read: int
    matrix_params: int
    kv_bytes_per_token: int
    attention_flops_per_pair: int


def make(shape: str, device: torch.device, dtype: torch.dtype) -> Weights:
    """A random model on `device`. The cost counts each matrix product once per token (the head once per step)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = SHAPES[shape]
    fixed = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **options, **fixed)
    torch.manual_seed(1)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    body = sum(p.numel() for name, p in module.named_parameters() if p.dim() > 1 and "embed" not in name)
    head = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = torch.finfo(dtype).bits // 8
    return Weights(
        module=module,
        bytes_read=(body + head) * item,
        matrix_params=body - (0 if head else config.vocab_size * config.hidden_size),
        kv_bytes_per_token=2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * item,
        attention_flops_per_pair=4 * config.num_hidden_layers * config.num_attention_heads * head_dim,
    )
