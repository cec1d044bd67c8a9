"""A model over several devices: each rank has a part of the weights, and the parts of a product are added or joined.

`plan` says, by the model's own table, which part of each weight a rank has and what its layers exchange; `weights`
loads only these parts; `group` exchanges tensors.
"""

from __future__ import annotations

from typing import Protocol

import torch


class RankLost(Exception):
    """The other ranks cannot be reached, or did not take part in time; the message gives the reason."""


class Group(Protocol):
    """The ranks of one engine. All call the same functions in the same order."""

    rank: int
    size: int

    def meet(self) -> None:
        """Wait until all ranks are here, for as long as they load. Raises RankLost."""
        ...

    def add(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `part`, in its place. Raises RankLost."""
        ...

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' parts [..., n], which have one shape, side by side: [..., size * n]. Raises RankLost."""
        ...
