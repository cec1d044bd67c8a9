from __future__ import annotations

import random

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model import sampler
from pdctl.engine.model.sampler import kept_probabilities, most_likely, prompt_tokens, sample, shape, uniform


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
    [kept] = kept_probabilities(row, [Sampling(1, temperature, top_p, top_k)])
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


def plainly(row: torch.Tensor, sampling: Sampling, position: int) -> int:
    """One row at a time, as the definition says."""
    scaled = (row.double() - row.double().max()) / sampling.temperature
    if 0 < sampling.top_k < scaled.numel():
        scaled = scaled.masked_fill(scaled < scaled.topk(sampling.top_k).values[-1], float("-inf"))
    kept = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = kept.sort(descending=True, stable=True)
        kept[order[ordered.cumsum(-1) - ordered >= sampling.top_p]] = 0
    if sampling.min_p > 0:
        kept[kept < sampling.min_p * kept.max()] = 0
    cumulative = kept.cumsum(-1).tolist()
    point = sampler.uniform(sampling.seed, position) * cumulative[-1]
    index = next((index for index, value in enumerate(cumulative) if value > point), len(cumulative) - 1)
    return max(at for at in range(index + 1) if kept[at] > 0)


@pytest.mark.parametrize("most", [1, 3, 64])
@pytest.mark.parametrize("seed", range(6))
def test_rows_drawn_together_are_those_drawn_alone(seed: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sampler._MOST_ROWS, "cpu", most)
    chance = random.Random(seed)
    dtype = torch.bfloat16 if seed == 5 else torch.float32
    rows = torch.stack([logits(100 * seed + n, 200) for n in range(40)]).to(dtype)
    wants = [
        (
            Sampling(
                1, chance.choice([0.0, 0.3, 1.0, 2.5]), chance.choice([1.0, 0.9, 0.4]), chance.choice([0, 1, 30, 999]),
                seed=chance.randrange(2**40), min_p=chance.choice([0.0, 0.0, 0.1]),
            ),
            chance.randrange(5000),
        )
        for _ in range(40)
    ]  # fmt: skip
    found = sample(rows, wants)
    for row, (sampling, position), token in zip(rows, wants, found, strict=True):
        assert token == (plainly(row, sampling, position) if sampling.temperature else int(row.argmax()))


@pytest.mark.parametrize("count", [0, 1, 23, 24, 500])
def test_many_draws_at_once_are_numpys(count: int) -> None:
    chance = random.Random(count)
    seeds = (0, 1, -1, 2**64 - 1)
    places = [
        (chance.choice((*seeds, chance.randrange(-(2**63), 2**64))), chance.choice((0, 2**32, chance.randrange(2**40))))
        for _ in range(count)
    ]
    assert sampler.uniforms(places) == [uniform(seed, position) for seed, position in places]


def test_a_draw_at_the_very_end_is_a_token_that_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sampler._MOST_ROWS, "cpu", 4)
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: 1.0 if position else 0.0)
    rows = torch.tensor([[1.0, 9.0, 8.0, 0.0, 0.0], [9.0, 8.0, 7.0, 6.0, 9.5]])
    wants = [(Sampling(1, 1.0, top_k=2), at) for at in (0, 1)]
    assert [sample(rows[[0]], [want])[0] for want in wants] == [1, 2]
    assert [sample(rows[[1]], [want])[0] for want in wants] == [0, 4]
    assert sample(rows, [wants[1], wants[0]]) == [2, 0]


def test_zero_temperature_is_greedy_beside_sampled_rows() -> None:
    rows = torch.stack([logits(1), logits(2)])
    chosen = sample(rows, [(Sampling(1, 0.0), 3), (Sampling(1, 1.0, top_k=1, seed=4), 3)])
    assert chosen == rows.argmax(-1).tolist()


def test_an_ulp_does_not_move_a_draw() -> None:
    row = logits(3)
    want = [(Sampling(1, 1.0, 0.9, seed=9), 17)]
    moved = sum(sample((row * (1 + 1e-7 * n))[None], want) != sample(row[None], want) for n in range(50))
    assert moved == 0


def shaped(sampling: Sampling, ids: list[int], prompt_len: int) -> torch.Tensor:
    row = torch.tensor([2.0, -2.0, 1.0, 0.0, 3.0])
    shape(row, sampling, ids, prompt_len, frozenset({4}))
    return row


def test_penalties_follow_their_definitions() -> None:
    # Prompt 0 1, output 2 2 3.
    ids = [0, 1, 2, 2, 3]
    presence = shaped(Sampling(9, presence_penalty=0.5), ids, 2)
    assert presence.tolist() == [2.0, -2.0, 0.5, -0.5, 3.0]
    frequency = shaped(Sampling(9, frequency_penalty=0.5), ids, 2)
    assert frequency.tolist() == [2.0, -2.0, 0.0, -0.5, 3.0]
    repetition = shaped(Sampling(9, repetition_penalty=2.0), ids, 2)
    assert repetition.tolist() == [1.0, -4.0, 0.5, 0.0, 3.0]


def test_biases_and_the_least_length() -> None:
    row = shaped(Sampling(9, logit_bias={0: -100.0}, min_tokens=2), [0, 1, 2], 2)
    assert row[0] == -98
    assert row[4] == float("-inf"), "the end token waits"
    assert shaped(Sampling(9, min_tokens=1), [0, 1, 2], 2)[4] == 3


def test_min_p_cuts_what_is_unlikely_beside_the_best() -> None:
    [kept] = kept_probabilities(torch.tensor([[3.0, 2.9, 0.0]]), [Sampling(1, 1.0, min_p=0.5)])
    assert (kept > 0).tolist() == [True, True, False]


def test_most_likely_tells_the_chosen_one_first() -> None:
    found = most_likely(torch.tensor([0.0, 2.0, 1.0]), 0, 2)
    assert [token for token, _ in found] == [0, 1, 2]
    expected = torch.tensor([0.0, 2.0, 1.0]).log_softmax(-1)
    assert found[0][1] == pytest.approx(float(expected[0]))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-8])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    row = logits(4) * 100
    assert sample(row[None], [(Sampling(1, temperature, seed=1), 3)]) == [int(row.argmax())]


def test_a_grammar_that_must_end_ends_before_the_least_length() -> None:
    row = torch.full((10,), float("-inf"))
    row[7] = 1.0
    shape(row, Sampling(5, min_tokens=3), [1, 2], 1, frozenset({7}))
    assert int(row.argmax()) == 7
    assert row.isfinite().sum() == 1
    free = torch.zeros(10)
    shape(free, Sampling(5, min_tokens=3), [1, 2], 1, frozenset({7}))
    assert free[7] == float("-inf")
    assert free.isfinite().sum() == 9


def test_bad_words_are_ruled_out_where_their_last_token_would_come() -> None:
    words = Sampling(10, bad_words=[[3], [1, 2], [7, 1, 4]])

    def forbidden(*output: int) -> set[int]:
        row = torch.zeros(8)
        shape(row, words, [9, 1, *output], 2, frozenset())
        return {index for index, value in enumerate(row.tolist()) if value == float("-inf")}

    assert forbidden() == {3}
    assert forbidden(1) == {3, 2}
    assert forbidden(7, 1) == {3, 2, 4}
    assert forbidden(1, 7) == {3}


def test_a_grammar_that_allows_nothing_but_bad_words_comes_first() -> None:
    row = torch.full((4,), float("-inf"))
    row[3] = 1.0
    shape(row, Sampling(10, bad_words=[[3]]), [0], 1, frozenset())
    assert row.tolist()[3] == 1.0


def test_what_is_told_of_a_prompt() -> None:
    rows = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    first, second = prompt_tokens(rows, [2, 0], 1)
    assert (first.rank, second.rank) == (2, 1)
    logs = rows.log_softmax(-1)
    assert [token for token, _ in first.logprobs] == [2, 1]
    assert [logprob for _, logprob in first.logprobs] == pytest.approx([float(logs[0, 2]), float(logs[0, 1])])
    assert [token for token, _ in second.logprobs] == [0, 0]
    assert len(prompt_tokens(rows, [2, 0], 0)[0].logprobs) == 1
