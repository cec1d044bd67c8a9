"""Copies rows that were read from a peer into the planes of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pdctl.engine.cache.memory import Bytes

Slots = npt.NDArray[np.int64]


class Columns(NamedTuple):
    """Bytes `source` to `source + length` of each of the rows that are in `begin` to `end` of what was read; they go to
    byte `target` of rows of a pool's plane number `plane`."""

    begin: int
    end: int
    plane: int
    source: int
    target: int
    length: int


def fill_host(planes: Sequence[Bytes], read: Bytes, slots: Slots, columns: Sequence[Columns]) -> None:
    """Copy within host memory. `planes`: [slots, bytes of a row]; `slots`: of each row that was read."""
    for begin, end, plane, source, target, length in columns:
        rows = read[begin:end].reshape(len(slots), -1)
        planes[plane][slots, target : target + length] = rows[:, source : source + length]


def fill_device(planes: Sequence[torch.Tensor], read: Bytes, slots: Slots, columns: Sequence[Columns]) -> None:
    """The same into a device's memory, all at once over the bus. `planes`: [slots, items of a row]. Nothing is waited
    for but the end of the reading of `read`."""
    device, dtype = planes[0].device, planes[0].dtype
    given = torch.from_numpy(read).to(device).view(dtype)
    index = torch.from_numpy(slots).to(device)
    for begin, end, plane, *places in columns:
        source, target, length = (place // dtype.itemsize for place in places)
        rows = given[begin // dtype.itemsize : end // dtype.itemsize].view(len(slots), -1)
        planes[plane][index, target : target + length] = rows[:, source : source + length]
