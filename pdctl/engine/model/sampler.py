"""From logits to token ids. Random choices depend only on (seed, position), so a request that moved to another engine
or was recomputed gets the same tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pdctl.engine.ipc.messages import Logprobs, PromptToken, Sampling
from pdctl.engine.model.copies import to_device
from pdctl.engine.model.native.rows import kernels

# Rows that are drawn together. On a CPU one row is what fits into its cache; on a GPU a row takes a few MB for a while.
_MOST_ROWS = {"cpu": 1, "cuda": 64}
# From how many draws on they are computed at once.
_FEWEST_AT_ONCE = 24
# Philox4x64-10 (Salmon et al., SC'11).
_PHILOX_ROUNDS = 10
_PHILOX_FACTORS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_PHILOX_WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
Words = npt.NDArray[np.uint64]


def sample(logits: torch.Tensor, requests: list[tuple[Sampling, int]]) -> list[int]:
    """As `choose`; the tokens are copied to the host in one piece."""
    found: list[int] = choose(logits, requests).tolist()
    return found


def choose(logits: torch.Tensor, requests: list[tuple[Sampling, int]]) -> torch.Tensor:
    """Choose a token [n] for each row of logits [n, vocab]; `requests`: its sampling and the token's position.

    All rows are computed on the logits' device, and nothing waits for it."""
    chosen = _largest(logits)
    drawn = [row for row, (sampling, _) in enumerate(requests) if sampling.temperature > 0]
    most = _MOST_ROWS[logits.device.type]
    for start in range(0, len(drawn), most):
        rows = drawn[start : start + most]
        where = _where(rows, logits)
        chosen[where] = _draw(logits[where], [requests[row] for row in rows])
    return chosen


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """The index of each row's largest logit [n]."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    functions = kernels(logits.dtype)
    found = None if functions is None else functions.largest(logits)
    if found is None or (len(found) and int(found.min()) < 0):
        # In bfloat16, argmax takes three times as long on a CPU as with this conversion.
        return logits.float().argmax(-1)
    return found


def shape(
    row: torch.Tensor, sampling: Sampling, token_ids: list[int], prompt_len: int, eos_token_ids: frozenset[int]
) -> None:
    """Apply penalties, biases, bad words and the minimum length to `row` [vocab] in place.

    Presence and frequency use only the output (OpenAI's definition), repetition uses prompt and output (CTRL, Keskar
    et al. 2019: positive logits are divided, negative ones multiplied).
    """
    output = token_ids[prompt_len:]
    if sampling.repetition_penalty != 1.0 and token_ids:
        observed = torch.tensor(sorted(set(token_ids)), device=row.device)
        before, factor = row[observed], sampling.repetition_penalty
        row[observed] = torch.where(before > 0, before / factor, before * factor)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = torch.bincount(torch.tensor(output, device=row.device), minlength=row.numel())
        row -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts
    if sampling.allowed_token_ids:
        allowed = torch.tensor(sampling.allowed_token_ids, device=row.device)
        kept = row[allowed].clone()
        row.fill_(float("-inf"))
        row[allowed] = kept
    if sampling.logit_bias:
        where = torch.tensor(list(sampling.logit_bias), device=row.device)
        row.index_add_(0, where, torch.tensor(list(sampling.logit_bias.values()), dtype=row.dtype, device=row.device))
    forbidden = {word[-1] for word in sampling.bad_words if output[len(output) - len(word) + 1 :] == word[:-1]}
    if len(output) < sampling.min_tokens:
        forbidden |= eos_token_ids | set(sampling.stop_token_ids)
    if forbidden:
        _forbid(row, sorted(forbidden))


def _forbid(row: torch.Tensor, token_ids: list[int]) -> None:
    where = torch.tensor(token_ids, device=row.device)
    before = row[where]
    row[where] = float("-inf")
    if not row.isfinite().any():
        # The grammar allows no other token: it takes precedence.
        row[where] = before


def most_likely(row: torch.Tensor, token_id: int, count: int) -> Logprobs:
    """The chosen token and the `count` most likely ones of `row` [vocab], with their log probabilities."""
    logs = row.float().log_softmax(-1)
    found = [(token_id, float(logs[token_id]))]
    if count:
        values, indices = logs.topk(min(count, logs.numel()))
        found += list(zip(indices.tolist(), values.tolist(), strict=True))
    return found


def prompt_tokens(rows: torch.Tensor, token_ids: list[int], count: int) -> list[PromptToken]:
    """For each of `rows` [n, vocab], the prompt's next token as in `most_likely`, and its rank."""
    logs = rows.float().log_softmax(-1)
    chosen = torch.tensor(token_ids, device=rows.device)[:, None]
    own = logs.gather(1, chosen)
    ranks = (logs > own).sum(-1) + 1
    values, indices = logs.topk(min(count, logs.shape[-1]))
    return [
        PromptToken(rank, [(token_id, one), *zip(tops, logprobs, strict=True)])
        for rank, token_id, one, tops, logprobs in zip(
            ranks.tolist(), token_ids, own[:, 0].tolist(), indices.tolist(), values.tolist(), strict=True
        )
    ]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of this seed at this position: Philox4x64 (Salmon et al., SC'11), keyed."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position))
    return float(generator.random())


def uniforms(places: list[tuple[int, int]]) -> list[float]:
    """`uniform` of each (seed, position). For many, all at once is several times as fast as numpy's generators."""
    if len(places) < _FEWEST_AT_ONCE:
        return [uniform(seed, position) for seed, position in places]
    key = np.array([seed % 2**64 for seed, _ in places], dtype=np.uint64)
    zero = np.zeros_like(key)
    # numpy's generator counts before it draws.
    start = np.array([position for _, position in places], dtype=np.uint64) + np.uint64(1)
    counter: tuple[Words, ...] = (start, zero, zero, zero)
    keys = (key, zero)
    with np.errstate(over="ignore"):
        for _ in range(_PHILOX_ROUNDS):
            counter = _philox_round(counter, keys)
            keys = (keys[0] + _PHILOX_WEYL[0], keys[1] + _PHILOX_WEYL[1])
    found: list[float] = ((counter[0] >> np.uint64(11)).astype(np.float64) * 2.0**-53).tolist()
    return found


def _philox_round(counter: tuple[Words, ...], keys: tuple[Words, Words]) -> tuple[Words, ...]:
    first, second = (_product(counter[2 * at], _PHILOX_FACTORS[at]) for at in range(2))
    return second[0] ^ counter[1] ^ keys[0], second[1], first[0] ^ counter[3] ^ keys[1], first[1]


def _product(words: Words, factor: np.uint64) -> tuple[Words, Words]:
    """The high and the low 64 bits of each product."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    words_low, words_high, factor_low, factor_high = words & low, words >> half, factor & low, factor >> half
    cross, other = words_low * factor_high, words_high * factor_low
    carry = ((words_low * factor_low >> half) + (cross & low) + (other & low)) >> half
    return words_high * factor_high + (cross >> half) + (other >> half) + carry, words * factor


def _draw(logits: torch.Tensor, requests: list[tuple[Sampling, int]]) -> torch.Tensor:
    """A token id for each row of logits [n, vocab], by inverse transform sampling in order of token id: a rounding
    difference changes the result only at a boundary."""
    probabilities = kept_probabilities(logits, [sampling for sampling, _ in requests])
    cumulative = probabilities.cumsum(-1)
    points = _column(uniforms([(sampling.seed, position) for sampling, position in requests]), logits.device)
    found = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
    if logits.device.type == "cpu" and probabilities.gather(1, found).all():
        return found[:, 0]
    # At a boundary the result may be a token that was filtered out; use the kept one before it.
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where((probabilities > 0) & (ids <= found), ids, 0).amax(-1)


def kept_probabilities(logits: torch.Tensor, samplings: list[Sampling]) -> torch.Tensor:
    """logits [n, vocab] -> [n, vocab] float64: softmax(logits / temperature), zero outside top-k and the top-p nucleus,
    not renormalised.

    Top-k is applied first, then top-p over what is left, as transformers' logits warpers do; then min-p.
    """
    device, vocab = logits.device, logits.shape[-1]
    # After this the largest is 0, so the division can only overflow to -inf, however small the temperature.
    scaled = logits.double()
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / _column([s.temperature for s in samplings], device)
    if rows := [row for row, s in enumerate(samplings) if 0 < s.top_k < vocab]:
        where = _where(rows, logits)
        ranks = to_device(torch.tensor([samplings[row].top_k - 1 for row in rows]), device)[:, None]
        part = scaled[where]
        threshold = part.topk(max(samplings[row].top_k for row in rows)).values.gather(1, ranks)
        scaled[where] = part.masked_fill(part < threshold, float("-inf"))
    probabilities = scaled.softmax(-1)
    if rows := [row for row, s in enumerate(samplings) if s.top_p < 1]:
        where = _where(rows, logits)
        ordered, order = probabilities[where].sort(descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= _column([samplings[row].top_p for row in rows], device)
        probabilities[where] = torch.empty_like(ordered).scatter_(1, order, ordered.masked_fill(outside, 0.0))
    if any(s.min_p > 0 for s in samplings):
        least = _column([s.min_p for s in samplings], device) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities


def _where(rows: list[int], of: torch.Tensor) -> torch.Tensor | slice:
    """An index for these rows: without a copy, if it is all of them."""
    return slice(None) if len(rows) == len(of) else to_device(torch.tensor(rows), of.device)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    """[n, 1] float64."""
    return to_device(torch.tensor(values, dtype=torch.float64), device)[:, None]
