"""Steps that are cut into stripes: each row sees what it sees in the whole step."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.attention import open_backend
from pdctl.engine.model.attention.batch import Call
from pdctl.engine.model.inputs import InputBuffers, Inputs
from pdctl.engine.model.parallel import Group
from pdctl.engine.model.parallel.stripes import settle, stripe_of
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence

SIZE, BLOCKS, HEADS, DIM = 4, 64, 2, 8
CPU = torch.device("cpu")


class _Rank:
    """See Group. `parts`: what each rank gave."""

    def __init__(self, stripe: int, parts: Many[torch.Tensor]) -> None:
        self.stripe, self.stripes = stripe, len(parts)
        self.parts = parts

    def gather(self, part: torch.Tensor, counts: Many[int]) -> torch.Tensor:
        assert part.shape[0] == counts[self.stripe]
        return torch.cat([one[:count] for one, count in zip(self.parts, counts, strict=True)])


def slices(pieces: list[tuple[int, int, bool]], chance: random.Random) -> list[Slice]:
    """(tokens before, new tokens, whether it samples)"""
    free, found = chance.sample(range(BLOCKS), BLOCKS), []
    for number, (before, count, samples) in enumerate(pieces):
        blocks = [free.pop() for _ in range(-(-(before + count) // SIZE))]
        ids = [chance.randrange(1000) for _ in range(before + count)]
        sequence = Sequence(f"r{number}", ids, len(ids), Sampling(4), block_ids=blocks)
        found.append(Slice(sequence, before, count, samples))
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 20), st.booleans()), min_size=1, max_size=5),
    st.integers(2, 4), st.sampled_from([None, 5]), st.randoms(),
)  # fmt: skip
def test_stripes_together_are_the_whole_step(
    pieces: list[tuple[int, int, bool]], stripes: int, window: int | None, chance: random.Random
) -> None:
    inputs = InputBuffers(SIZE, CPU).build(slices(pieces, chance))
    tokens = inputs.ids.shape[0]
    ranks = [SimpleNamespace(stripe=stripe, stripes=stripes) for stripe in range(stripes)]
    keep = inputs.keep.numpy()
    found = [stripe_of(inputs, keep, cast(Group, rank)) for rank in ranks]
    if tokens < 8 * stripes:
        assert found == [None] * stripes, "every rank computes it whole"
        return
    torch.manual_seed(1)
    query, keys, values = (torch.randn(rows, HEADS, DIM) for rows in (tokens, BLOCKS * SIZE, BLOCKS * SIZE))
    backend, call = open_backend("gather", CPU), Call(DIM**-0.5, window)
    backend.begin(inputs.batch)
    expected = backend.attend(query, keys, values, inputs.batch, call)
    outs, ids, first = [], [], 0
    for stripe in found:
        assert stripe is not None
        assert torch.equal(stripe.inputs.batch.write_slots, inputs.batch.write_slots), "it writes everybody's KV"
        end = first + stripe.inputs.ids.shape[0]
        backend.begin(stripe.inputs.batch)
        outs.append(backend.attend(query[first:end], keys, values, stripe.inputs.batch, call))
        ids.append(stripe.inputs.ids)
        first = end
    assert torch.equal(torch.cat(ids), inputs.ids)
    assert torch.allclose(torch.cat(outs), expected, atol=1e-5)
    # As logits: each row's number.
    numbers, firsts = torch.arange(tokens)[:, None], [0, *torch.tensor([len(one) for one in ids]).cumsum(0).tolist()]
    logits = [numbers[firsts[at] + stripe.inputs.keep] for at, stripe in enumerate(found) if stripe is not None]
    rows = [numbers[start:end] for start, end in pairwise(firsts)]
    for at, stripe in enumerate(found):
        assert stripe is not None
        rank = cast(Group, _Rank(at, logits))
        assert stripe.whole(logits[at], rank)[:, 0].tolist() == inputs.keep.tolist()
        assert torch.equal(stripe.exchanged(rows[at], cast(Group, _Rank(at, rows))), numbers)


def test_stripes_are_on_the_device_of_the_step() -> None:
    """A device whose tensors the host cannot read: as a GPU's, they must be made there."""
    chance = random.Random(3)
    inputs = InputBuffers(SIZE, CPU).build(slices([(4, 20, True), (0, 9, True)], chance))
    there = torch.device("meta")
    batch = replace(
        inputs.batch, write_slots=inputs.batch.write_slots.to(there), starts=inputs.batch.starts.to(there),
        lengths=inputs.batch.lengths.to(there), table=inputs.batch.table.to(there),
    )  # fmt: skip
    moved = Inputs(inputs.ids.to(there), inputs.positions.to(there), inputs.keep.to(there), batch)
    for number in range(2):
        stripe = stripe_of(moved, inputs.keep.numpy(), cast(Group, SimpleNamespace(stripe=number, stripes=2)))
        assert stripe is not None
        part = stripe.inputs
        tensors = (part.ids, part.positions, part.keep, stripe.order, part.batch.starts, part.batch.lengths)
        assert {one.device for one in (*tensors, part.batch.table, part.batch.write_slots)} == {there}
    gathered: list[torch.Tensor] = []
    settle(cast(Group, SimpleNamespace(stripes=2, gather=lambda part, counts: gathered.append(part))), there)
    assert gathered[0].device == there
