from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pdctl.engine.messages import Sampling
from pdctl.engine.sampler import kept_probabilities, sample, uniform


def logits(seed: int = 0, vocab: int = 500) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 40, 10_000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_filters_agree_with_transformers(temperature: float, top_k: int, top_p: float) -> None:
    row = logits()[None].double()
    expected = TemperatureLogitsWarper(temperature)(torch.empty(1, 0), row)
    if top_k:
        expected = TopKLogitsWarper(top_k)(torch.empty(1, 0), expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(torch.empty(1, 0), expected)
    wanted = expected[0].softmax(-1)
    kept = kept_probabilities(row[0], Sampling(1, temperature, top_p, top_k))
    assert torch.equal(kept > 0, wanted > 0)
    assert torch.allclose(kept / kept.sum(), wanted, atol=1e-9)


def test_draws_follow_the_distribution() -> None:
    row = torch.tensor([0.0, 1.0, 2.0, -30.0])
    draws = torch.tensor([sample(row[None], [(Sampling(1, 1.0, seed=5), n)])[0] for n in range(4000)])
    expected = row.softmax(-1)
    assert torch.allclose(torch.bincount(draws, minlength=4) / 4000, expected, atol=0.03)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    rows = torch.stack([logits(n) for n in range(6)])
    wants = [(Sampling(1, 1.0, 0.95, seed=n), 100 + n) for n in range(6)]
    together = sample(rows, wants)
    alone = [sample(rows[n][None], [wants[n]])[0] for n in reversed(range(6))]
    assert together == alone[::-1]
    assert len({uniform(1, n) for n in range(100)}) == 100
    assert uniform(1, 5) != uniform(2, 5)


def test_zero_temperature_is_greedy_beside_sampled_rows() -> None:
    rows = torch.stack([logits(1), logits(2)])
    chosen = sample(rows, [(Sampling(1, 0.0), 3), (Sampling(1, 1.0, top_k=1, seed=4), 3)])
    assert chosen == rows.argmax(-1).tolist()


def test_an_ulp_does_not_move_a_draw() -> None:
    row = logits(3)
    want = [(Sampling(1, 1.0, 0.9, seed=9), 17)]
    moved = sum(sample((row * (1 + 1e-7 * n))[None], want) != sample(row[None], want) for n in range(50))
    assert moved == 0
