"""The tensors of one step, from the scheduler's slices: token ids, positions, KV slots, block tables.

They are built with numpy in one host buffer and copied to the device in one piece. On the CPU the tensors are views of
the host buffer. There are two buffers: the inputs of a step are built while the step before it is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pdctl.engine.model.attention.batch import Batch, HostRows, Ints
from pdctl.engine.schedule.batch import Slice

Longs = npt.NDArray[np.int64]
# Rows of block tables are kept for so many sequences more than the last batch had.
_SPARE_ROWS = 64
_FEWEST_BYTES = 1 << 16


class Shape(NamedTuple):
    """Sizes of a step: new tokens, rows with logits, sequences, blocks of the longest sequence."""

    tokens: int
    kept: int
    sequences: int
    width: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return 8 * (3 * self.tokens + self.kept) + 4 * (2 * self.sequences + 1 + self.sequences * self.width)


class Padding(NamedTuple):
    """What unused rows of a step compute: a token at the end of a sequence of `length` tokens in one block."""

    block: int
    token_id: int = 0
    length: int = 1


class Fields(NamedTuple):
    """The numpy arrays of a step, in one buffer. See Inputs and HostRows."""

    ids: Longs
    positions: Longs
    slots: Longs
    keep: Longs
    starts: Ints
    lengths: Ints
    table: Ints


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a forward pass needs. `ids`, `positions`: [T]. `keep`: the rows whose logits are computed."""

    ids: torch.Tensor
    positions: torch.Tensor
    keep: torch.Tensor
    batch: Batch


class _Buffer:
    """Memory for the inputs of one step: on the host, and on the device, unless that is the same."""

    def __init__(self) -> None:
        self.host = torch.empty(0, dtype=torch.uint8)
        self.device = self.host
        self.copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait until the device has copied what is on the host."""
        if self.copied is not None:
            self.copied.synchronize()


class Staged(NamedTuple):
    """The inputs of a step on the host. `following`: so many of its first ids are rows of the step before it, whose
    sampled tokens they stand for."""

    buffer: _Buffer
    shape: Shape
    fields: Fields
    following: int

    @property
    def data(self) -> bytes:
        """The inputs as bytes, for `InputBuffers.restage`."""
        return self.buffer.host.numpy()[: self.shape.num_bytes].tobytes()


class InputBuffers:
    """Builds the inputs of steps, each valid until the second next one is built. `tables`: shared with other buffers.
    `is_static`: the tensors of all steps have one place, apart from the host's, as CUDA graphs need it. They are valid
    until the next upload."""

    def __init__(
        self, block_size: int, device: torch.device, tables: BlockTables | None = None, is_static: bool = False
    ) -> None:
        self.block_size = block_size
        self.device = device
        self.tables = tables or BlockTables()
        self._is_static = is_static
        self._buffers = (_Buffer(), _Buffer())

    def build(self, batch: list[Slice], every_row: bool = False, rows: Iterable[int] = ()) -> Inputs:
        """The inputs for these slices; logits of those that sample, then of `rows`; or of every row."""
        return self.upload(self.stage(batch, every_row, rows))

    def stage(
        self,
        batch: list[Slice],
        every_row: bool = False,
        rows: Iterable[int] = (),
        sources: list[int] | None = None,
    ) -> Staged:
        """The same on the host. `sources`: for each slice the row of the step before it that samples its token."""
        counts = np.array([piece.num_rows for piece in batch], dtype=np.int32)
        first = np.array([piece.start for piece in batch], dtype=np.int32)
        starts = np.zeros(len(batch) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        keep = range(int(starts[-1])) if every_row else _kept(batch, starts, rows)
        width = -(-int((first + counts).max()) // self.block_size)
        shape = Shape(int(starts[-1]), len(keep), len(batch), width)
        buffer, fields = self._next(shape)
        fields.starts[:] = starts
        fields.keep[:] = keep
        self._fill(fields, batch, counts, first, sources)
        return Staged(buffer, shape, fields, len(sources or ()))

    def stage_padded(
        self, batch: list[Slice], shape: Shape, padding: Padding, sources: list[int] | None = None
    ) -> Staged:
        """The inputs for slices of one token each, at the places where every step of this shape has them. The rows that
        are left are `padding`."""
        count = len(batch)
        buffer, fields = self._next(shape)
        fields.starts[:] = np.arange(shape.sequences + 1)
        fields.keep[:] = np.arange(shape.kept)
        fields.ids[count:] = padding.token_id
        fields.positions[count:] = padding.length - 1
        fields.slots[count:] = padding.block * self.block_size + padding.length - 1
        fields.lengths[count:] = padding.length
        fields.table[count:, 0] = padding.block
        if batch:
            first = np.array([piece.start for piece in batch], dtype=np.int32)
            self._fill(fields, batch, np.ones(count, dtype=np.int32), first, sources)
        return Staged(buffer, shape, fields, len(sources or ()))

    def restage(self, shape: Shape, data: bytes) -> Staged:
        """What another rank has staged."""
        buffer, fields = self._next(shape)
        buffer.host.numpy()[: shape.num_bytes] = np.frombuffer(data, dtype=np.uint8)
        return Staged(buffer, shape, fields, 0)

    def upload(self, staged: Staged, sampled: torch.Tensor | None = None) -> Inputs:
        """Copy what is staged to the device. `sampled` [n]: the tokens of the step before, where it follows one."""
        buffer, shape = staged.buffer, staged.shape
        if buffer.device is not buffer.host:
            buffer.device[: shape.num_bytes].copy_(buffer.host[: shape.num_bytes], non_blocking=True)
            if self.device.type == "cuda":
                buffer.copied = torch.cuda.current_stream(self.device).record_event()
        inputs = inputs_of(buffer.device, shape, staged.fields, self.block_size, self._is_static)
        if staged.following:
            assert sampled is not None
            own = inputs.ids[: staged.following]
            own.copy_(sampled.index_select(0, own))
        return inputs

    def reserve(self, num_bytes: int) -> None:
        """Make room for steps of this size, so that later ones stay in place. Inputs built before are invalid."""
        shared = self._on_device(num_bytes) if self._is_static else None
        for buffer in self._buffers:
            self._grow(buffer, num_bytes, shared)

    def _grow(self, buffer: _Buffer, num_bytes: int, shared: torch.Tensor | None = None) -> None:
        on_gpu = self.device.type == "cuda"
        # Zeroed: what is left of a table row after its blocks is a block id, too.
        buffer.host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        buffer.device = shared if shared is not None else self._on_device(num_bytes) if on_gpu else buffer.host

    def _on_device(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)

    def _next(self, shape: Shape) -> tuple[_Buffer, Fields]:
        first, second = self._buffers
        self._buffers = second, first
        # The last step that used it may not have sampled anything, and so may not have waited for the device.
        second.wait()
        if shape.num_bytes > len(second.host):
            assert not self._is_static, "a graph's inputs must stay in place"
            self._grow(second, max(_FEWEST_BYTES, 2 * shape.num_bytes))
        return second, host_fields(second.host, shape)

    def _fill(self, fields: Fields, batch: list[Slice], counts: Ints, first: Ints, sources: list[int] | None) -> None:
        """The rows of `batch`; `starts` are there already."""
        fields.lengths[: len(batch)] = first + counts
        indices, table = self.tables.rows(batch)
        width = -(-int((first + counts).max()) // self.block_size)
        fields.table[: len(batch), :width] = table[indices, :width]
        tokens = int(fields.starts[len(batch)])
        fields.ids[:tokens] = _ids(batch, tokens) if sources is None else sources
        sequence = np.repeat(np.arange(len(batch)), counts)
        positions = np.arange(tokens) - np.repeat(fields.starts[: len(batch)] - first, counts)
        fields.positions[:tokens] = positions
        size = self.block_size
        fields.slots[:tokens] = fields.table[sequence, positions // size].astype(np.int64) * size + positions % size


class BlockTables:
    """The block tables of the last sequences as rows of one array, so that a step writes only what is new."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, list[int]]] = {}
        self._free: list[int] = []
        self._table: Ints = np.zeros((0, 0), dtype=np.int32)

    def rows(self, batch: list[Slice]) -> tuple[Longs, Ints]:
        """The row of each slice's sequence, and the array. A row's blocks are followed by old ones."""
        longest = max(len(piece.sequence.block_ids) for piece in batch)
        if len(batch) > len(self._known) + len(self._free) or longest > self._table.shape[1]:
            self._grow(len(batch), longest)
        elif len(self._known) > 2 * len(batch) + _SPARE_ROWS:
            self._forget_all_but(batch)
        found = np.empty(len(batch), dtype=np.int64)
        for index, piece in enumerate(batch):
            # The whole list is compared: a sequence may have lost its blocks and got others since its last step.
            known = self._known.get(piece.sequence.request_id)
            current = known is not None and known[1] == piece.sequence.block_ids
            found[index] = known[0] if known is not None and current else self._write(piece, known)
        return found, self._table

    def _write(self, piece: Slice, known: tuple[int, list[int]] | None) -> int:
        blocks = piece.sequence.block_ids
        if known is None and not self._free:
            self._grow(len(self._table) + 1, len(blocks))
        row, before = known or (self._free.pop(), [])
        same = len(before) if before == blocks[: len(before)] else 0
        self._table[row, same : len(blocks)] = blocks[same:]
        self._known[piece.sequence.request_id] = (row, list(blocks))
        return row

    def _grow(self, rows: int, width: int) -> None:
        old_rows, old_width = self._table.shape
        shape = (max(old_rows, 2 * rows + _SPARE_ROWS), old_width if width <= old_width else 2 * width)
        table = np.zeros(shape, dtype=np.int32)
        table[:old_rows, :old_width] = self._table
        self._free += range(old_rows, shape[0])
        self._table = table

    def _forget_all_but(self, batch: list[Slice]) -> None:
        wanted = {piece.sequence.request_id for piece in batch}
        gone = [name for name in self._known if name not in wanted]
        self._free += [self._known.pop(name)[0] for name in gone]


def host_fields(buffer: torch.Tensor, shape: Shape) -> Fields:
    """The arrays of a step of this shape in a host buffer [bytes]."""
    tokens, kept, sequences, width = shape
    end = 8 * (3 * tokens + kept)
    found = buffer.numpy()[: shape.num_bytes]
    ids, positions, slots, keep = np.split(found[:end].view(np.int64), [tokens, 2 * tokens, 3 * tokens])
    starts, lengths, table = np.split(found[end:].view(np.int32), [sequences + 1, 2 * sequences + 1])
    return Fields(ids, positions, slots, keep, starts, lengths, table.reshape(sequences, width))


def inputs_of(buffer: torch.Tensor, shape: Shape, fields: Fields, block_size: int, is_static: bool = False) -> Inputs:
    """The tensors of a step of this shape in a buffer [bytes] on any device; `fields`: the same on the host."""
    tokens, kept, sequences, width = shape
    end = 8 * (3 * tokens + kept)
    longs, ints = buffer[:end].view(torch.int64), buffer[end : shape.num_bytes].view(torch.int32)
    ids, positions, slots, keep = torch.split(longs, [tokens, tokens, tokens, kept])
    starts, lengths, table = torch.split(ints, [sequences + 1, sequences, sequences * width])
    counts = fields.starts[1:] - fields.starts[:-1]
    batch = Batch(
        block_size=block_size,
        write_slots=slots,
        starts=starts,
        lengths=lengths,
        table=table.view(sequences, width),
        host=HostRows(fields.starts, fields.lengths, fields.table),
        longest_query=int(counts.max()),
        longest=width * block_size if is_static else int(fields.lengths.max()),
        num_single=int((counts == 1).sum()),
        is_static=is_static,
    )
    return Inputs(ids, positions, keep, batch)


def _ids(batch: list[Slice], tokens: int) -> list[int]:
    """The tokens of all slices. A guess is not among the sequence's tokens."""
    if len(batch) == tokens:
        return [piece.sequence.token_ids[piece.start] if piece.count else piece.drafts[0] for piece in batch]
    ids: list[int] = []
    for piece in batch:
        ids += piece.token_ids
    return ids


def _kept(batch: list[Slice], starts: Ints, rows: Iterable[int]) -> list[int]:
    ends = starts[1:].tolist()
    kept = [end - 1 for piece, end in zip(batch, ends, strict=True) if piece.num_sampled]
    # A batch of only inner chunks samples nothing, but models project at least one row.
    return [*kept, *rows] or [ends[-1] - 1]
