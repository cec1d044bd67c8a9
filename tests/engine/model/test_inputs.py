"""The tensors of a step against a plain computation, over random lives of sequences."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.inputs import InputBuffers
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence

SIZE = 4


def check(buffers: InputBuffers, batch: list[Slice], rows: list[int]) -> None:
    made = buffers.build(batch, rows=rows)
    ids, positions, slots, keep, starts = [], [], [], [], [0]
    for piece in batch:
        blocks = piece.sequence.block_ids
        for at in range(piece.start, piece.start + piece.count):
            ids.append(piece.sequence.token_ids[at])
            positions.append(at)
            slots.append(blocks[at // SIZE] * SIZE + at % SIZE)
        starts.append(len(ids))
        if piece.samples:
            keep.append(len(ids) - 1)
    assert made.ids.tolist() == ids
    assert made.positions.tolist() == positions
    assert made.keep.tolist() == ([*keep, *rows] or [len(ids) - 1])
    found = made.batch
    assert found.write_slots.tolist() == slots
    assert found.starts.tolist() == found.host.starts.tolist() == starts
    lengths = [piece.start + piece.count for piece in batch]
    assert found.lengths.tolist() == found.host.lengths.tolist() == lengths
    for index, (piece, length) in enumerate(zip(batch, lengths, strict=True)):
        used = -(-length // SIZE)
        assert found.table[index, :used].tolist() == piece.sequence.block_ids[:used]
    assert np.array_equal(found.table.numpy(), found.host.table)
    assert found.longest_query == max(piece.count for piece in batch)
    assert found.longest == max(lengths)
    assert found.num_single == sum(piece.count == 1 for piece in batch)
    assert found.write_slots.dtype == made.ids.dtype == torch.int64


@pytest.mark.parametrize("seed", range(10))
def test_random_lives(seed: int) -> None:
    """Sequences grow, end, lose their blocks and get others, under the same name and in the same list."""
    chance = random.Random(seed)
    buffers = InputBuffers(SIZE, torch.device("cpu"))
    alive: list[Sequence] = []
    for step in range(60):
        if len(alive) < 3 or chance.random() < 0.4:
            ids = [chance.randrange(99) for _ in range(chance.randint(1, 300 if step > 30 else 30))]
            alive.append(Sequence(f"{step}", ids, len(ids), Sampling(9)))
        batch = []
        for sequence in chance.sample(alive, chance.randint(1, len(alive))):
            if chance.random() < 0.2:
                sequence.block_ids.clear()
                sequence.num_computed = 0
            if not sequence.num_missing:
                sequence.token_ids.append(chance.randrange(99))
            count = chance.choice([1, sequence.num_missing, chance.randint(1, sequence.num_missing)])
            needed = -(-(sequence.num_computed + count) // SIZE) + chance.randint(0, 2)
            sequence.block_ids += [chance.randrange(999) for _ in range(needed - len(sequence.block_ids))]
            batch.append(Slice(sequence, sequence.num_computed, count, count == sequence.num_missing))
        check(buffers, batch, [0] if chance.random() < 0.3 else [])
        for piece in batch:
            piece.sequence.num_computed += piece.count
        if chance.random() < 0.3:
            alive.pop(chance.randrange(len(alive)))


def test_rows_of_ended_sequences_are_used_again() -> None:
    buffers = InputBuffers(SIZE, torch.device("cpu"))
    for number in range(3000):
        check(buffers, [Slice(Sequence(f"{number}", [1], 1, Sampling(1), block_ids=[number]), 0, 1, True)], [])
    assert len(buffers.tables._table) < 200
