"""The computation of one step: slices in, token ids out.

A step of plain slices (`schedule.ahead`) has two halves: `prepare` needs the host, `start` only the device. So it can
be prepared and started while the step before it computes, whose sampled tokens it takes from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.ipc.messages import Logprobs, Sampling
from pdctl.engine.model.attention import Backend, hook, open_backend
from pdctl.engine.model.grammar import Grammars
from pdctl.engine.model.graphs import Graphs, GraphsRefused, Recorder, batch_sizes
from pdctl.engine.model.inputs import InputBuffers, Inputs, Shape, Staged
from pdctl.engine.model.loading import (
    LoadedModel,
    check_agreement,
    check_token_ids,
    dense_logits,
    forward,
    rounding_noise,
)
from pdctl.engine.model.parallel import Group
from pdctl.engine.model.parallel.stripes import settle, stripe_of
from pdctl.engine.model.sampler import choose, most_likely, prompt_tokens, sample, shape
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence

# Limit of the time for capturing graphs; what is left is computed without.
_CAPTURE_S = 60.0
_USED_AFTER_FREE = "KV was read after its blocks were freed"


class Others(Protocol):
    """The other ranks of an engine: they compute what this one does."""

    def step(self, staged: Staged, gives_back: bool) -> None:
        """Have them compute a step. `gives_back`: see Group."""
        ...

    def dense(self, ids: torch.Tensor, implementation: str) -> None:
        """Have them compute `dense_logits`."""
        ...


class _PromptPart(NamedTuple):
    """Rows of a batch with the logits for a prompt's next tokens, `token_ids`."""

    sequence: Sequence
    rows: range
    token_ids: list[int]


class _Row(NamedTuple):
    """A row of logits that yields a token: the one after a sequence's tokens and these drafts."""

    sequence: Sequence
    drafts: tuple[int, ...]

    @property
    def token_ids(self) -> list[int]:
        """The tokens before it."""
        return [*self.sequence.token_ids, *self.drafts] if self.drafts else self.sequence.token_ids

    @property
    def position(self) -> int:
        """The number of tokens before it."""
        return len(self.sequence.token_ids) + len(self.drafts)


class Prepared(NamedTuple):
    """A plain step, ready to start. `is_graph`: it is one of the CUDA graphs."""

    staged: Staged
    is_graph: bool
    requests: list[tuple[Sampling, int]]


class Sampled:
    """The tokens of a plain step, `on_device` [n], and on their way to the host."""

    def __init__(self, tokens: torch.Tensor, logits: torch.Tensor | None) -> None:
        self.on_device = tokens
        self._is_finite = None if logits is None else torch.isfinite(logits).all()
        self._on_host, self._copied = tokens, None
        if tokens.device.type == "cuda":
            self._on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._on_host.copy_(tokens, non_blocking=True)
            self._copied = torch.cuda.current_stream(tokens.device).record_event()

    def read(self) -> list[int]:
        """The token ids; waits for them. What is queued on the device behind them is not waited for."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._is_finite is not None and not self._is_finite:
            raise AssertionError(_USED_AFTER_FREE)
        found: list[int] = self._on_host.tolist()
        return found


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
        row += piece.num_rows
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
        backend: Backend | None = None,
        others: Others | None = None,
        group: Group | None = None,
    ) -> None:
        """`others`, `group`: the other ranks, of which the first one tells the others its steps."""
        self.loaded = loaded
        self.pool = pool
        self.device = device
        self.poisoned = poisoned
        self.grammars = grammars or Grammars(None, loaded.vocab_size, loaded.eos_token_ids)
        self.backend = backend or open_backend("gather", device)
        self._buffers = InputBuffers(pool.block_size, device)
        self._graphs: Graphs | None = None
        self._others = others
        self._group = group if group is not None and group.stripes > 1 else None
        self._stages = group if group is not None and group.stages > 1 else None

    def prepare(self, batch: list[Slice], before: list[Slice] | None = None) -> Prepared:
        """The host's half of a step of plain slices. `before`: the step that samples their tokens, if that still
        computes; it has all their sequences."""
        sources = None
        if before is not None:
            rows = {piece.sequence.request_id: row for row, piece in enumerate(before)}
            sources = [rows[piece.sequence.request_id] for piece in batch]
        requests = [(piece.sequence.sampling, piece.start + piece.count) for piece in batch]
        if self._graphs is not None and (staged := self._graphs.stage(batch, sources)) is not None:
            return Prepared(staged, True, requests)
        return Prepared(self._buffers.stage(batch, sources=sources), False, requests)

    @torch.inference_mode()
    def start(self, prepared: Prepared, before: Sampled | None = None) -> Sampled:
        """The device's half. It reads no sequence, so these may change meanwhile. `before`: the tokens of the step
        before, where this one follows it."""
        logits = self._logits(prepared.staged, prepared.is_graph, before.on_device if before is not None else None)
        logits = logits[: len(prepared.requests)]
        return Sampled(choose(logits, prepared.requests), logits if self.poisoned else None)

    def execute(self, batch: list[Slice]) -> tuple[list[int], list[Logprobs | None]]:
        """Compute every slice. Returns, in order, a token id and its log probabilities for each sampling slice and each
        draft."""
        prompts = _prompt_parts(batch)
        logits = self.logits(batch, rows=[row for part in prompts for row in part.rows])
        if self.poisoned and not torch.isfinite(logits).all():
            raise AssertionError(_USED_AFTER_FREE)
        rows = [_Row(piece.sequence, piece.drafts[:at]) for piece in batch for at in range(piece.num_sampled)]
        at = len(rows)
        for part in prompts:
            part.sequence.prompt_logprobs += prompt_tokens(
                logits[at : at + len(part.rows)], part.token_ids, part.sequence.sampling.prompt_logprobs
            )
            at += len(part.rows)
        if not rows:
            # Nothing was waited for. What was computed may be published next, or its blocks given to a transfer.
            self.pool.settle()
            return [], []
        logits = logits[: len(rows)]
        told = {at: logits[at].clone() for at, row in enumerate(rows) if row.sequence.sampling.logprobs >= 0}
        for at, row in enumerate(rows):
            if row.sequence.sampling.is_shaped:
                self._shape(logits[at], row)
        chosen = sample(logits, [(row.sequence.sampling, row.position) for row in rows])
        for row, token_id in zip(rows, chosen, strict=True):
            if row.sequence.sampling.grammar:
                self.grammars.accept(row.sequence, token_id)
        # From the model's own distribution, before penalties and masks, as in vLLM.
        return chosen, [
            most_likely(told[at], token_id, rows[at].sequence.sampling.logprobs) if at in told else None
            for at, token_id in enumerate(chosen)
        ]

    @torch.inference_mode()
    def _shape(self, logits: torch.Tensor, row: _Row) -> None:
        sequence = row.sequence
        if sequence.sampling.grammar:
            assert not row.drafts, "the state of a grammar goes only forward"
            self.grammars.mask(logits, sequence)
        shape(logits, sequence.sampling, row.token_ids, sequence.prompt_len, self.loaded.eos_token_ids)

    def logits(self, batch: list[Slice], every_row: bool = False, rows: Iterable[int] = ()) -> torch.Tensor:
        """Logits of every sampling slice and draft [n, vocab], then those of `rows` of the batch; or of every row."""
        rows = list(rows)
        batch = [part for piece in batch for part in piece.parts]
        if self._graphs is not None and not every_row and not rows:
            found = self._graphs.stage(batch)
            if found is not None:
                return self._logits(found, True)[: len(batch)]
        return self._logits(self._buffers.stage(batch, every_row, rows), False)

    def advance(self, batch: list[Slice]) -> None:
        """Compute a part of a step that yields nothing, without waiting for later stages: they have computed it when
        they have computed the part after it."""
        assert self._stages is not None
        self._stages.gives_back = False
        try:
            self.logits(batch)
        finally:
            self._stages.gives_back = True

    def _logits(self, staged: Staged, is_graph: bool, sampled: torch.Tensor | None = None) -> torch.Tensor:
        if is_graph:
            assert self._graphs is not None
            return self._graphs.replay(staged, sampled)
        if self._others is not None:
            self._others.step(staged, self._stages is None or self._stages.gives_back)
        inputs = self._buffers.upload(staged, sampled)
        group = self._group
        stripe = stripe_of(inputs, staged.fields.keep, group) if group is not None else None
        if stripe is None or group is None:
            self._begin(inputs)
            logits = self._compute(inputs)
            if group is not None:
                settle(group, self.device)
            return logits
        self._begin(stripe.inputs)
        return stripe.whole(self._compute(stripe.inputs, lambda part: stripe.exchanged(part, group)), group)

    def follow(self, shape: Shape, data: bytes, gives_back: bool) -> None:
        """Compute a step as another rank has staged it, which samples its tokens. `gives_back`: see Group."""
        if self._stages is not None:
            self._stages.gives_back = gives_back
        self._logits(self._buffers.restage(shape, data), False)

    def capture(self, most: int, max_model_len: int, scratch: int, recorder: Recorder) -> list[int]:
        """Use graphs for decode steps of up to `most` tokens from now on; the sizes that have one. `scratch`: a block
        that no sequence uses. Raises GraphsRefused, and then computes without graphs."""
        if not self.backend.is_capturable:
            raise GraphsRefused(f"attention by {self.backend.name} cannot be captured")
        buffers = InputBuffers(self.pool.block_size, self.device, self._buffers.tables, is_static=True)
        width = -(-max_model_len // self.pool.block_size)
        graphs = Graphs(buffers, batch_sizes(most), width, scratch, self._begin, self._compute)
        graphs.capture(recorder, _CAPTURE_S)
        self._graphs = graphs
        return graphs.sizes

    def replay_of(self, size: int) -> Callable[[], None] | None:
        """The replay of the graph that computes batches of this size, for measurements; None if there is none."""
        return self._graphs.replay_of(size) if self._graphs is not None else None

    def _begin(self, inputs: Inputs) -> None:
        self.backend.begin(inputs.batch)

    def _compute(self, inputs: Inputs, exchange: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        # A recorded step must make its own notes: another step's would be part of the recording.
        inputs.batch.notes.clear()
        first_layer = self.loaded.part.first_layer
        hook.set_context(hook.Step(self.pool, self.backend, inputs.batch, first_layer, exchange))
        try:
            return forward(self.loaded.module, inputs.ids, inputs.positions, inputs.keep)
        finally:
            hook.set_context(None)

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
        dense = self._dense(ids)
        noise = rounding_noise(dense, lambda: self._dense(ids, "sdpa"))
        check_agreement(torch.cat([first, second]), dense, type(self.loaded.module).__name__, noise)
        for plane in (*self.pool.keys, *self.pool.values):
            plane[: 2 * needed * size].zero_()

    def _dense(self, ids: torch.Tensor, implementation: str = "eager") -> torch.Tensor:
        if self._others is not None:
            self._others.dense(ids, implementation)
        return dense_logits(self.loaded, ids, implementation)
