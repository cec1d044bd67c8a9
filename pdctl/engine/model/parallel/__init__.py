"""A model over several devices.

Ranks of a stage share each product, whose parts are added or joined; stages have different layers; or each rank has the
whole model, and computes a stripe of a step's rows. `plan` says, by the model's own table, which part of each weight a
rank has and what its layers exchange; `stages` says which layers it has; `weights` loads only these parts; `stripes`
cuts steps; `group` exchanges tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class RankLost(Exception):
    """The other ranks cannot be reached, or did not take part in time; the message gives the reason."""


class Group(Protocol):
    """The ranks of one engine. All call the same functions in the same order. `rank` of `size`: in the stage `stage` of
    `stages`; or `stripe` of `stripes`, and then nothing else is shared. `gives_back`: in the passes that follow, the
    last stage gives its hidden states to the first, which waits for them."""

    rank: int
    size: int
    stage: int
    stages: int
    stripe: int
    stripes: int
    gives_back: bool

    def meet(self) -> None:
        """Wait until all ranks are here, for as long as they load. Raises RankLost."""
        ...

    def add(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of the `part` of all ranks of this stage, in its place. Raises RankLost."""
        ...

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """The parts [..., n] of all ranks of this stage, which have one shape, side by side: [..., size * n]. Raises
        RankLost."""
        ...

    def gather(self, part: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The parts [counts[stripe], n] of all stripes, one after the other: [sum(counts), n]. Raises RankLost."""
        ...

    def pass_on(self, hidden: torch.Tensor) -> None:
        """Give the next stage hidden states; the last one gives them to the first. Raises RankLost."""
        ...

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """The hidden states of the stage before, with the shape and type of `like`. Raises RankLost."""
        ...
