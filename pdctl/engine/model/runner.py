"""The computation of one step: slices in, token ids out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.ipc.messages import Logprobs, Sampling
from pdctl.engine.model import attention
from pdctl.engine.model.attention import BatchContext, PackedSequence, PaddedRows
from pdctl.engine.model.grammar import Grammars
from pdctl.engine.model.loading import (
    LoadedModel,
    check_agreement,
    check_token_ids,
    dense_logits,
    forward,
    rounding_noise,
)
from pdctl.engine.model.sampler import most_likely, prompt_tokens, sample, shape
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence

# Padded KV lengths are multiples of this.
_PAD_TO = 128


class _PromptPart(NamedTuple):
    """Rows of a batch with the logits for a prompt's next tokens, `token_ids`."""

    sequence: Sequence
    rows: range
    token_ids: list[int]


def _prompt_parts(batch: list[Slice]) -> list[_PromptPart]:
    """For every sequence that lacks log probabilities of its prompt; those computed before a preemption are kept."""
    found, row = [], 0
    for piece in batch:
        sequence = piece.sequence
        if sequence.lacks_prompt_logprobs:
            first = max(piece.start, len(sequence.prompt_logprobs))
            end = min(piece.start + piece.count, sequence.prompt_len - 1)
            if first < end:
                rows = range(row + first - piece.start, row + end - piece.start)
                found.append(_PromptPart(sequence, rows, sequence.token_ids[first + 1 : end + 1]))
        row += piece.count
    return found


class ModelRunner:
    """Runs batches of slices through the model over the pool."""

    def __init__(
        self,
        loaded: LoadedModel,
        pool: KvPool,
        device: torch.device,
        poisoned: bool = False,
        grammars: Grammars | None = None,
    ) -> None:
        self.loaded = loaded
        self.pool = pool
        self.device = device
        self.poisoned = poisoned
        self.grammars = grammars or Grammars(None, loaded.vocab_size, loaded.eos_token_ids)
        self._offsets = torch.arange(pool.block_size, device=device)
        # Decode one by one on the CPU, where a view of the pool is free; batched on a GPU, where launches are
        # expensive.
        self.pads = device.type == "cuda"

    def execute(self, batch: list[Slice]) -> tuple[list[int], list[Logprobs | None]]:
        """Compute every slice. Returns, in order, a token id and its log probabilities for each sampling slice."""
        prompts = _prompt_parts(batch)
        logits = self.logits(batch, rows=[row for part in prompts for row in part.rows])
        if self.poisoned and not torch.isfinite(logits).all():
            raise AssertionError("KV was read after its blocks were freed")
        sequences = [piece.sequence for piece in batch if piece.samples]
        at = len(sequences)
        for part in prompts:
            part.sequence.prompt_logprobs += prompt_tokens(
                logits[at : at + len(part.rows)], part.token_ids, part.sequence.sampling.prompt_logprobs
            )
            at += len(part.rows)
        if not sequences:
            return [], []
        logits = logits[: len(sequences)]
        told = {row: logits[row].clone() for row, s in enumerate(sequences) if s.sampling.logprobs >= 0}
        for row, sequence in enumerate(sequences):
            if sequence.sampling.is_shaped:
                self._shape(logits[row], sequence)
        chosen = sample(logits, [(sequence.sampling, len(sequence.token_ids)) for sequence in sequences])
        for sequence, token_id in zip(sequences, chosen, strict=True):
            if sequence.sampling.grammar:
                self.grammars.accept(sequence, token_id)
        # From the model's own distribution, before penalties and masks, as in vLLM.
        return chosen, [
            most_likely(told[row], token_id, sequences[row].sampling.logprobs) if row in told else None
            for row, token_id in enumerate(chosen)
        ]

    @torch.inference_mode()
    def _shape(self, row: torch.Tensor, sequence: Sequence) -> None:
        if sequence.sampling.grammar:
            self.grammars.mask(row, sequence)
        shape(row, sequence.sampling, sequence.token_ids, sequence.prompt_len, self.loaded.eos_token_ids)

    def logits(self, batch: list[Slice], every_row: bool = False, rows: Iterable[int] = ()) -> torch.Tensor:
        """Logits [sampling slices, vocab], then those of `rows` of the batch; or of every row."""
        ids: list[int] = []
        positions: list[int] = []
        writes: list[int] = []
        packed: list[PackedSequence] = []
        single: list[tuple[int, Sequence, int]] = []
        last_rows: list[int] = []
        for piece in batch:
            sequence, start, count = piece.sequence, piece.start, piece.count
            if count == 1 and self.pads:
                single.append((len(ids), sequence, start + 1))
            else:
                slots, first_slot = self._slots(sequence, start + count)
                packed.append(PackedSequence(len(ids), count, start + count, slots, first_slot))
            ids += sequence.token_ids[start : start + count]
            positions += range(start, start + count)
            writes += self._written(sequence, start, count)
            if piece.samples:
                last_rows.append(len(ids) - 1)
        # A batch of only inner chunks samples nothing, but models project at least one row.
        keep = torch.arange(len(ids)) if every_row else torch.tensor([*last_rows, *rows] or [len(ids) - 1])
        write_slots = torch.tensor(writes).to(self.device)
        attention.set_context(BatchContext(self.pool, write_slots, packed, self._padded(single)))
        try:
            return forward(self.loaded.module, torch.tensor(ids), torch.tensor(positions), keep)
        finally:
            attention.set_context(None)

    def _padded(self, single: list[tuple[int, Sequence, int]]) -> PaddedRows | None:
        """Tables of (row, sequence, KV length) on the device; None without any."""
        if not single:
            return None
        size, longest = self.pool.block_size, max(length for _, _, length in single)
        blocks = np.zeros((len(single), -(-longest // size)), dtype=np.int64)
        for index, (_, sequence, length) in enumerate(single):
            used = -(-length // size)
            blocks[index, :used] = sequence.block_ids[:used]
        table = torch.from_numpy(blocks).to(self.device)
        rows = torch.tensor([row for row, _, _ in single]).to(self.device)
        lengths = torch.tensor([length for _, _, length in single]).to(self.device)
        # Round up to have few shapes: kernels and cached memory depend on the shape. Padding repeats the first token,
        # because slots after the last one may contain NaN, which a mask would not remove.
        columns = torch.arange(-(-longest // _PAD_TO) * _PAD_TO, device=self.device)[None]
        columns = torch.where(columns < lengths[:, None], columns, 0)
        slots = table.gather(1, columns // size) * size + columns % size
        return PaddedRows(rows, slots, lengths, longest)

    def _written(self, sequence: Sequence, start: int, count: int) -> list[int]:
        """The pool slots of `count` tokens from `start` on."""
        size, blocks = self.pool.block_size, sequence.block_ids
        return [blocks[at // size] * size + at % size for at in range(start, start + count)]

    def self_check(self) -> None:
        """Compare paged logits of a few tokens, in two chunks over scattered blocks, with dense ones.

        Raises ModelRefused. Uses the first blocks of the still unused pool, and leaves them zeroed.
        """
        ids = check_token_ids(self.loaded.vocab_size)
        size = self.pool.block_size
        needed = -(-len(ids) // size)
        scattered = list(range(2 * needed - 1, 0, -2))
        sequence = Sequence("self-check", ids.tolist(), len(ids), Sampling(max_tokens=1), block_ids=scattered)
        cut = len(ids) - size // 2 - 1
        first = self.logits([Slice(sequence, 0, cut, False)], every_row=True)
        second = self.logits([Slice(sequence, cut, len(ids) - cut, True)], every_row=True)
        dense = dense_logits(self.loaded, ids)
        noise = rounding_noise(self.loaded, ids, dense)
        check_agreement(torch.cat([first, second]), dense, type(self.loaded.module).__name__, noise)
        for plane in (*self.pool.keys, *self.pool.values):
            plane[: 2 * needed * size].zero_()

    def _slots(self, sequence: Sequence, kv_len: int) -> tuple[torch.Tensor, int | None]:
        """The pool slots of the first `kv_len` tokens, and the first slot if they form a run."""
        size = self.pool.block_size
        blocks = sequence.block_ids[: -(-kv_len // size)]
        if blocks[-1] - blocks[0] == len(blocks) - 1 and blocks == list(range(blocks[0], blocks[-1] + 1)):
            first = blocks[0] * size
            return torch.arange(first, first + kv_len, device=self.device), first
        table = torch.tensor(blocks).to(self.device)[:, None] * size + self._offsets
        return table.flatten()[:kv_len], None
