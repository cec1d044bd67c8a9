"""CUDA graphs of decode steps: one for each of a few batch sizes, captured when the engine starts.

A step of single tokens is filled up to the next size with rows that compute in a block of nobody, and replayed: one
launch instead of some hundred. Every graph is compared with the same step without a graph before it is used.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from typing import Protocol

import torch

from pdctl.engine.model.inputs import InputBuffers, Inputs, Padding, Shape, Staged
from pdctl.engine.schedule.batch import Slice

# Of the largest logit. The kernels are the same, so only their order of summing may differ.
_TOLERANCE = 2e-2
_WARM_UPS = 2


class Recorder(Protocol):
    """Records work on a device."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` and record it; the returned function repeats it on the same memory."""
        ...


class GraphsRefused(Exception):
    """A step cannot be captured, or its replay computes something else; the message gives the reason."""


class Graphs:
    """Graphs for batches of up to `sizes[-1]` sequences with up to `width` blocks each.

    `compute`: a forward pass, returns logits [kept, vocab]; `begin`: what goes before it and is not captured.
    `scratch`: a block that no sequence uses.
    """

    def __init__(
        self,
        buffers: InputBuffers,
        sizes: list[int],
        width: int,
        scratch: int,
        begin: Callable[[Inputs], None],
        compute: Callable[[Inputs], torch.Tensor],
    ) -> None:
        assert sizes == sorted(set(sizes))
        self.sizes = sizes
        self._buffers = buffers
        self._width = width
        self._scratch = scratch
        self._begin = begin
        self._compute = compute
        self._replays: dict[int, Callable[[], None]] = {}
        self._logits = torch.empty(0)

    def capture(self, recorder: Recorder, most_s: float) -> None:
        """Capture every size, the largest first, for at most `most_s` seconds; sizes that are left go without. Raises
        GraphsRefused."""
        end = time.monotonic() + most_s
        self._buffers.reserve(self._shape(self.sizes[-1]).num_bytes)
        for size in reversed(self.sizes):
            if time.monotonic() > end:
                break
            try:
                self._capture(size, recorder)
            # Whatever a model or a kernel does that cannot be captured, in words of many libraries.
            except RuntimeError as failure:
                self._replays.clear()
                raise GraphsRefused(" ".join(str(failure).split())[:200]) from failure
        self.sizes = sorted(self._replays)

    def stage(self, batch: list[Slice], sources: list[int] | None = None) -> Staged | None:
        """The inputs of a step for `replay`; None for a batch that no graph computes. `sources`: see InputBuffers."""
        at = bisect.bisect_left(self.sizes, len(batch))
        if at == len(self.sizes) or not all(piece.num_rows == piece.num_sampled == 1 for piece in batch):
            return None
        longest = max(piece.start for piece in batch) + 1
        if longest > self._width * self._buffers.block_size:
            return None
        return self._buffers.stage_padded(batch, self._shape(self.sizes[at]), Padding(self._scratch), sources)

    def replay(self, staged: Staged, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [size, vocab] of a step and its padding, valid until the next call."""
        size = staged.shape.sequences
        self._begin(self._buffers.upload(staged, sampled))
        self._replays[size]()
        return self._logits[:size]

    def replay_of(self, size: int) -> Callable[[], None] | None:
        """The graph that computes batches of this size, over what its buffers hold; None if there is none."""
        at = bisect.bisect_left(self.sizes, size)
        return self._replays[self.sizes[at]] if at < len(self.sizes) else None

    def _shape(self, size: int) -> Shape:
        return Shape(size, size, size, self._width)

    def _capture(self, size: int, recorder: Recorder) -> None:
        inputs = self._padding(size, Padding(self._scratch))
        first = self._compute(inputs)
        if len(self._logits) < size:
            self._logits = torch.empty_like(first)

        def work() -> None:
            self._logits[:size].copy_(self._compute(inputs))

        self._replays[size] = recorder.record(work)
        self._check(size)

    def _padding(self, size: int, padding: Padding) -> Inputs:
        inputs = self._buffers.upload(self._buffers.stage_padded([], self._shape(size), padding))
        self._begin(inputs)
        return inputs

    def _check(self, size: int) -> None:
        """Another token at another place than when it was captured: the replay must see what is in the buffers now."""
        inputs = self._padding(size, Padding(self._scratch, token_id=1, length=self._buffers.block_size))
        expected = self._compute(inputs).float()
        self._logits[:size].fill_(torch.nan)
        self._replays[size]()
        worst = float((self._logits[:size].float() - expected).abs().max())
        allowed = _TOLERANCE * max(float(expected.abs().max()), 1e-6)
        if not worst <= allowed:
            raise GraphsRefused(f"a replayed step of {size} differs by {worst:.3g} where {allowed:.3g} is allowed")


class CudaRecorder:
    """See Recorder. All graphs share one pool of memory, because they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Recorder.record. Warms up on a side stream, as torch.cuda.graph asks for."""
        current = torch.cuda.current_stream(self._device)
        try:
            return self._recorded(work, current)
        finally:
            # A capture that fails leaves its own stream as the current one.
            torch.cuda.set_stream(current)

    def _recorded(self, work: Callable[[], None], current: torch.cuda.Stream) -> Callable[[], None]:
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                work()
        current.wait_stream(side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: transfers.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, 8 and so on, then in steps of 16 from 32 on, and `most` itself."""
    sizes = {size for size in (1, 2, 4, 8, 16, *range(32, most, 16)) if size < most}
    return sorted(sizes | {most})
