"""The tensors of a step against a plain computation, over random lives of sequences."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.inputs import InputBuffers, Padding, Shape
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


def decodes(count: int, start: int, token: int) -> list[Slice]:
    """Slices of sequences that have `start` tokens before the one that is computed."""
    found = []
    for number in range(count):
        ids = [token + number] * (start + 1)
        blocks = list(range(10 * number, 10 * number + 1 + start // SIZE))
        found.append(Slice(Sequence(f"{number}", ids, 1, Sampling(9), block_ids=blocks), start, 1, True))
    return found


def test_a_step_is_staged_beside_the_one_that_computes() -> None:
    buffers = InputBuffers(SIZE, torch.device("cpu"))
    running = buffers.build(decodes(3, 6, token=50))
    staged = buffers.stage(decodes(5, 7, token=60))
    assert running.ids.tolist() == [50, 51, 52]
    assert running.positions.tolist() == [6, 6, 6]
    assert running.batch.lengths.tolist() == running.batch.host.lengths.tolist() == [7, 7, 7]
    assert buffers.upload(staged).ids.tolist() == [60, 61, 62, 63, 64]


def test_a_following_step_takes_the_tokens_of_the_one_before_from_the_device() -> None:
    """Its own tokens are not there yet."""
    buffers = InputBuffers(SIZE, torch.device("cpu"))
    batch = decodes(3, 6, token=50)
    following = [Slice(piece.sequence, 7, 1, True) for piece in (batch[2], batch[0])]
    made = buffers.upload(buffers.stage(following, sources=[2, 0]), torch.tensor([70, 71, 72]))
    assert made.ids.tolist() == [72, 70]
    assert made.positions.tolist() == [7, 7]
    assert made.batch.lengths.tolist() == [8, 8]
    assert made.batch.write_slots.tolist() == [21 * SIZE + 3, SIZE + 3]


def test_static_inputs_have_one_place_for_every_step_until_they_are_uploaded() -> None:
    buffers = InputBuffers(SIZE, torch.device("cpu"), is_static=True)
    shape, padding = Shape(4, 4, 4, 3), Padding(99)
    buffers.reserve(shape.num_bytes)
    first = buffers.upload(buffers.stage_padded(decodes(2, 6, token=50), shape, padding))
    staged = buffers.stage_padded(decodes(3, 7, token=60), shape, padding, sources=[1, 0, 2])
    assert first.ids.tolist() == [50, 51, 0, 0]
    second = buffers.upload(staged, torch.tensor([70, 71, 72]))
    assert first.ids.data_ptr() == second.ids.data_ptr()
    assert second.ids.tolist() == [71, 70, 72, 0]
    assert second.batch.lengths.tolist() == [8, 8, 8, 1]
