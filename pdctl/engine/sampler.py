"""From logits to token ids. Random choices depend on (seed, position) alone, so a request that moved to another
engine, or was computed anew, draws what it would have drawn."""

from __future__ import annotations

import numpy as np
import torch

from pdctl.engine.messages import Sampling


def sample(logits: torch.Tensor, requests: list[tuple[Sampling, int]]) -> list[int]:
    """logits [n, vocab]; for each row its sampling and the position of the token to be chosen."""
    chosen: list[int] = logits.argmax(-1).tolist()
    for row, (sampling, position) in enumerate(requests):
        if sampling.temperature > 0:
            chosen[row] = _draw(logits[row], sampling, position)
    return chosen


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of this seed at this position: Philox4x64 (Salmon et al., SC'11), keyed."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position))
    return float(generator.random())


def _draw(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Inverse transform sampling in order of token id: an ulp in the logits moves the outcome only at a border."""
    probabilities = kept_probabilities(logits, sampling)
    cumulative = probabilities.cumsum(-1)
    point = uniform(sampling.seed, position) * float(cumulative[-1])
    wanted = torch.tensor(point, dtype=cumulative.dtype, device=cumulative.device)
    index = int(torch.searchsorted(cumulative, wanted, right=True))
    index = min(index, cumulative.numel() - 1)
    # A border hit may land on a token that was filtered out; the kept one before it is meant.
    while probabilities[index] == 0:
        index -= 1
    return index


def kept_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[vocab] float64: softmax(logits / temperature), zero outside top-k and the top-p nucleus, not renormalised.

    Top-k is applied first, then top-p over what is left, as transformers' logits warpers do.
    """
    scaled = logits.double() / sampling.temperature
    if 0 < sampling.top_k < scaled.numel():
        threshold = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < threshold, float("-inf"))
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities[order[outside]] = 0
    return probabilities
