"""The rows of a step over several ranks, each of which has the whole model and all KV: a prompt is computed in stripes.

A rank computes its rows, one stripe of the step. Each layer's keys and values are exchanged, so that every pool has all
of them, and the rows with logits at the end. Small steps are not worth that: every rank computes them whole, and so all
have the same KV.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from pdctl.engine.model.attention.batch import Batch, HostRows, Ints
from pdctl.engine.model.copies import to_device
from pdctl.engine.model.inputs import Inputs, Longs
from pdctl.engine.model.parallel import Group

# Rows of a stripe, at least. Fewer take about as long as the exchanges (pdctl's own estimate).
FEWEST_ROWS = 8


class Stripe(NamedTuple):
    """One rank's rows of a step. `rows`, `kept`: of each rank, all rows and those with logits; `order`: where each row
    with logits stands among those of all ranks, one after the other."""

    inputs: Inputs
    rows: list[int]
    kept: list[int]
    order: torch.Tensor

    def exchanged(self, part: torch.Tensor, group: Group) -> torch.Tensor:
        """All rows of the step, from this rank's [rows, n]."""
        return group.gather(part, self.rows)

    def whole(self, logits: torch.Tensor, group: Group) -> torch.Tensor:
        """The logits [kept, vocab] of the step, from those of this rank."""
        own = logits[: self.kept[group.stripe]]
        return group.gather(own, self.kept)[self.order]


def stripe_of(inputs: Inputs, keep: Longs, group: Group) -> Stripe | None:
    """This rank's part of a step; None for one that every rank computes whole. `keep`: of the inputs, on the host."""
    tokens = inputs.ids.shape[0]
    if tokens < FEWEST_ROWS * group.stripes:
        return None
    cuts = [stripe * tokens // group.stripes for stripe in range(group.stripes + 1)]
    first, end = cuts[group.stripe], cuts[group.stripe + 1]
    owner = np.searchsorted(cuts, keep, side="right") - 1
    own = keep[owner == group.stripe] - first
    kept = np.bincount(owner, minlength=group.stripes).tolist()
    # Models project at least one row; nobody reads it.
    rows = own if len(own) else np.zeros(1, dtype=np.int64)
    device = inputs.ids.device
    batch = _cut(inputs.batch, first, end, device)
    part = Inputs(inputs.ids[first:end], inputs.positions[first:end], to_device(torch.from_numpy(rows), device), batch)
    order = to_device(torch.from_numpy(np.argsort(np.argsort(owner, kind="stable"), kind="stable")), device)
    return Stripe(part, [after - before for before, after in pairwise(cuts)], kept, order)


def settle(group: Group, device: torch.device) -> None:
    """Return when every rank has computed a step whole. One that is behind would still write KV into blocks that are
    somebody else's by then, and what it has not written yet could be read."""
    group.gather(torch.zeros(1, 1, device=device), [1] * group.stripes)


def _cut(batch: Batch, first: int, end: int, device: torch.device) -> Batch:
    """The rows [first, end) of a batch, which still writes the KV of all its rows."""
    starts, lengths, table = batch.host
    begin = int(np.searchsorted(starts, first, side="right")) - 1
    stop = int(np.searchsorted(starts, end, side="left"))
    own: Ints = np.clip(starts[begin : stop + 1], first, end) - first
    # The last sequence may go on in the next stripe: its rows there come after those here.
    later = starts[begin + 1 : stop + 1] - np.clip(starts[begin + 1 : stop + 1], first, end)
    until: Ints = lengths[begin:stop] - later
    counts = own[1:] - own[:-1]
    host = HostRows(own, until, table[begin:stop])
    return Batch(
        block_size=batch.block_size,
        write_slots=batch.write_slots,
        starts=to_device(torch.from_numpy(own), device),
        lengths=to_device(torch.from_numpy(until), device),
        table=to_device(torch.from_numpy(host.table), device),
        host=host,
        longest_query=int(counts.max()),
        longest=int(until.max()),
        num_single=int((counts == 1).sum()),
    )
