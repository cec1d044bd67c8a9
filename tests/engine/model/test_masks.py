"""Where a model's own masks stop being the hook's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from pdctl.engine.model.attention import masks
from pdctl.engine.model.attention.batch import LayerNeed
from pdctl.engine.model.attention.hook import HookCall
from pdctl.engine.model.loading import ModelRefused
from tests.engine.parity.families import build

FAR = 5000


def horizon(rule: masks.Rule, window: int | None = None) -> int:
    mask = masks._mask(1, 3, 3, rule)
    return masks.horizon([HookCall(0, LayerNeed(1, 1, 1, 1, window), mask)], FAR)


@pytest.mark.parametrize("window", [None, 1, 8, 4096])
def test_the_hooks_own_rules_hold_everywhere(window: int | None) -> None:
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    assert horizon(rule, window) == FAR


@pytest.mark.parametrize("size", [1, 2, 7, 100, 1000, 4096, 4999])
def test_other_rules_hold_as_far_as_they_are_the_same(size: int) -> None:
    chunks: masks.Rule = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
    assert horizon(chunks) == size
    assert horizon(sliding_window_causal_mask_function(size)) == size, "the hook was not told of the window"
    assert horizon(causal_mask_function, size) == size, "the hook was told of a window that is not there"


def test_a_model_that_sees_what_follows_can_be_served_nowhere() -> None:
    assert horizon(bidirectional_mask_function) == 0


def test_a_layer_without_a_mask_says_nothing() -> None:
    assert masks.horizon([HookCall(0, LayerNeed(1, 1, 1, 1), None)], FAR) == FAR


LONG: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 96,
}  # fmt: skip
LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2}


@pytest.mark.parametrize(
    ("kind", "options", "positions"),
    [
        ("llama", {}, 512),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}, 512),
        ("llama4_text", {**LLAMA4, "attention_chunk_size": 100}, 100),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 96}, 96),
        ("llama", {"rope_parameters": {**LONG, "rope_type": "dynamic", "factor": 2.0}}, 96),
    ],
)
def test_models_are_served_as_far_as_they_are_computed_right(
    kind: str, options: dict[str, Any], positions: int
) -> None:
    """Beyond, Llama 4 looks only at a part of the sequence, and these rotations depend on the longest of a batch."""
    assert build(kind, options).loaded.max_positions == positions


def test_masks_that_cannot_be_checked_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise IndexError("not a rule over positions")

    monkeypatch.setattr(masks, "horizon", broken)
    with pytest.raises(ModelRefused, match="cannot be checked"):
        build("llama")
