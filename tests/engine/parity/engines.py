"""Engines in this process: the scheduler that ships, the runner that ships, a pool each. No sockets, no clock."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import Half, block_bytes, spans
from pdctl.engine.cache.memory import Memory
from pdctl.engine.cache.prefix import root
from pdctl.engine.executor.launches import Launches, Step
from pdctl.engine.ipc.messages import Held, Sampling
from pdctl.engine.model.attention.batch import Batch as AttentionBatch
from pdctl.engine.model.attention.batch import Call
from pdctl.engine.model.attention.gather import GatherBackend
from pdctl.engine.model.loading import LoadedModel
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.schedule.ahead import LAUNCHED
from pdctl.engine.schedule.batch import Batch, Limits, Slice
from pdctl.engine.schedule.prompts.policies import POLICIES
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence, Status
from pdctl.speculative import Speculative
from pdctl.wire import Manifest
from tests.engine.model.test_graphs import Again
from tests.engine.parity.told import TOLD

CPU = torch.device("cpu")
_MOST_PREEMPTED = 4


@dataclass(frozen=True)
class Setting:
    """How an engine runs. `preempt_every`: steps after which a running sequence loses its blocks; 0: never by force.
    `pads`: batched decode, as on a GPU. `graphs`: decode steps filled up and repeated, as CUDA graphs are. `segment`:
    see Limits. `ahead`: a thread computes the steps, and the next one is launched while it computes one."""

    block_size: int = 8
    blocks: int = 96
    tokens: int = 64
    seqs: int = 4
    policy: str = "fcfs"
    shares: bool = True
    segment: int = 0
    preempt_every: int = 0
    pads: bool = False
    graphs: bool = False
    speculative: Speculative | None = None
    ahead: bool = False


def random_setting(chance: random.Random) -> Setting:
    """Any setting; the pool is so small that sequences also lose their blocks by themselves."""
    block_size = chance.choice((4, 8, 16, 32))
    setting = Setting(
        block_size=block_size,
        blocks=chance.choice((128, 256, 640)) // block_size,
        tokens=chance.choice((7, 11, 16, 29, 64)),
        seqs=chance.randint(2, 5),
        policy=chance.choice(sorted(POLICIES)),
        shares=chance.random() < 0.7,
        preempt_every=chance.choice((2, 3, 5, 7)),
        pads=chance.random() < 0.3,
        graphs=chance.random() < 0.3,
        speculative=chance.choice((None, TOLD, TOLD, Speculative("ngram", 3, 1, 2))),
    )
    # With guesses, no step is ahead.
    return replace(setting, ahead=True, speculative=None) if chance.random() < 0.4 else setting


class Capturable(GatherBackend):
    """On the CPU, a recorded step is computed again."""

    is_capturable = True

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch, call: Call) -> Tensor:
        # A recorded step has the batch of its recording, and masks of padded rows depend on this one's lengths.
        batch.notes.clear()
        return super().attend(query, keys, values, batch, call)


@dataclass
class Engine:
    """One engine. Freed blocks are NaN, and reading one is an error."""

    loaded: LoadedModel
    setting: Setting
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    outputs: dict[str, list[int]] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    sequences: list[Sequence] = field(default_factory=list)
    steps: int = 0
    flight: Step | None = None

    def __post_init__(self) -> None:
        setting = self.setting
        self.manifest = Manifest(self.loaded.fingerprint, self.loaded.dtype, setting.block_size, self.loaded.shapes)
        # The last block is nobody's, as on a GPU.
        self.memory = Memory(block_bytes(self.manifest) * (setting.blocks + 1), "parity")
        pool = KvPool(self.manifest, setting.blocks + 1, self.memory, CPU)
        self.runner = ModelRunner(self.loaded, pool, CPU, True, backend=Capturable(pads=setting.pads))
        self.runner.self_check()
        if setting.graphs:
            self.runner.capture(setting.seqs - 1, 256, setting.blocks, Again())
        self.runner.pool.poison(list(range(setting.blocks)))
        self.launches = Launches(self.runner, in_thread=setting.ahead)
        limits = Limits(
            setting.seqs, setting.tokens, 512, setting.block_size, frozenset(), policy=setting.policy,
            segment=setting.segment,
        )  # fmt: skip
        allocator = BlockAllocator(setting.blocks, self.runner.pool.poison)
        names = root(self.manifest) if setting.shares else None
        self.scheduler = Scheduler(
            limits, allocator, clock=lambda: float(self.steps), root=names, speculative=setting.speculative
        )

    def add(
        self, name: str, prompt: list[int], sampling: Sampling, resume: tuple[int, ...] = (), hold: bool = False
    ) -> None:
        """Queue a request; `resume`: output that it has already."""
        sequence = Sequence(name, [*prompt, *resume], len(prompt), sampling, hold=hold)
        sequence.priority = self.chance.randint(0, 1)
        self.sequences.append(sequence)
        assert self.scheduler.add(sequence) is None

    def step(self) -> None:
        """Compute one batch. The next one may compute then."""
        self.steps += 1
        every = self.setting.preempt_every
        # One that is preempted for ever never gets done.
        running = [sequence for sequence in self.scheduler.running if sequence.preemptions < _MOST_PREEMPTED]
        if every and self.steps % every == 0 and running:
            self.settle()
            running = [sequence for sequence in running if sequence in self.scheduler.running]
        if every and self.steps % every == 0 and running:
            self.scheduler._preempt(self.chance.choice(running), Batch(0))
        flight = self.flight or self._launch(self.scheduler.schedule())
        if flight is not None and self.setting.ahead:
            self.flight = self._launch(self.scheduler.schedule_ahead(flight.batch), flight)
        self._finish(flight)

    def settle(self) -> None:
        """Finish the step that still computes."""
        flight, self.flight = self.flight, None
        self._finish(flight)

    def _launch(self, batch: list[Slice], after: Step | None = None) -> Step | None:
        return self.launches.launch(batch, after) if batch else None

    def _finish(self, flight: Step | None) -> None:
        if flight is not None:
            outcome = self.scheduler.update(flight.batch, *flight.finish())
            for token in outcome.tokens:
                self.outputs.setdefault(token.request_id, []).append(token.token_id)
            self.held |= {held.request_id: held for held in outcome.held}
        self.scheduler.audit()

    @property
    def preempted(self) -> int:
        """How often a sequence lost its blocks."""
        return sum(sequence.preemptions for sequence in self.sequences)

    @property
    def cached(self) -> int:
        """Tokens of prompts that were not computed."""
        return self.scheduler.books(0).prefix_hits

    @property
    def accepted(self) -> int:
        """Guessed tokens that were right."""
        return self.scheduler.books(0).accepted

    @property
    def launched_ahead(self) -> int:
        """Steps that were launched while another one computed."""
        return self.scheduler.ahead.asked.get(LAUNCHED, 0)

    def run(self) -> None:
        """Run until nothing is left to compute."""
        while self.scheduler.has_work or self.flight is not None:
            self.step()
            assert self.steps < 5000, "requests starve"

    def idle(self) -> None:
        """Check that no block is in use."""
        assert self.scheduler.allocator.num_free == self.setting.blocks
        assert not self.scheduler.sequences


def hand_over(
    source: Engine, target: Engine, name: str, prompt: list[int], sampling: Sampling, resume: list[int]
) -> None:
    """Move a held prefill's KV into the other engine, which goes on at the next token."""
    held = source.held.pop(name)
    sequence = Sequence(
        name, [*prompt, *resume, held.token_id], len(prompt), sampling, kv_tokens=held.num_tokens,
        status=Status.AWAITING_BLOCKS,
    )  # fmt: skip
    scheduler = target.scheduler
    assert scheduler.add(sequence) is None
    while sequence not in (reserved := scheduler.reserve()):
        assert not reserved
        target.step()
    assert scheduler.pull_started(name)
    ours = Half(target.manifest, target.runner.pool.num_blocks, list(sequence.block_ids))
    theirs = Half(source.manifest, source.runner.pool.num_blocks, held.block_ids)
    first = sequence.num_cached
    for span in spans(theirs, ours, first, held.num_tokens - first):
        found = source.memory.view[span.source : span.source + span.length]
        target.memory.view[span.target : span.target + span.length] = found
    scheduler.pull_ended(name)
    assert scheduler.start(name)
    source.scheduler.abort(name)
    scheduler.audit()
