"""One engine of an imagined service: its scheduler in virtual time, its end and its restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pdctl.adapters import Condition
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import Failed, Held, Progress, Token
from pdctl.engine.schedule.batch import Limits, Outcome
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.engine.virtual import Processor, VirtualEngine, VirtualTime
from pdctl.simulation.spec import EngineSpec

# The beginning of the names of blocks, if prompts may begin alike.
_ROOT = b"simulation"


class Call(Protocol):
    """What has a request at an engine, and is told what becomes of it."""

    def token(self, node: Node, token: Token) -> None:
        """A token was sampled; with a finish reason, the request has left the engine."""

    def held(self, node: Node, held: Held) -> None:
        """The prompt is computed and its KV kept for a peer."""

    def progress(self, node: Node, done: Progress) -> None:
        """A part of the prompt is computed, and may be read by a peer."""

    def withdrawn(self, node: Node) -> None:
        """What could be read before is gone."""

    def reserved(self, node: Node, sequence: Sequence) -> None:
        """The blocks for a peer's KV are reserved."""

    def refused(self, node: Node, failed: Failed) -> None:
        """The request can never fit."""

    def given_back(self, node: Node) -> None:
        """The engine does not compute prompts for peers any more, and has not begun this one."""

    def lost(self, node: Node) -> None:
        """The engine died."""


class Node:
    """An engine. `life`: counts its starts; `model` makes a latency model for each; `shares_prefixes`: prompts may
    begin alike, so that blocks are named and found."""

    def __init__(
        self,
        spec: EngineSpec,
        time: VirtualTime,
        model: Callable[[], LatencyModel],
        processor: Processor | None,
        stretch: Callable[[], float],
        shares_prefixes: bool,
    ) -> None:
        self.spec = spec
        self.calls: dict[str, Call] = {}
        self.life = 0
        self.is_up = False
        self.kv_peak = 0.0
        self._time, self._model, self._processor, self._stretch = time, model, processor, stretch
        self._root = _ROOT if shares_prefixes and spec.prefix_caching else None
        self._earlier = (0.0, 0)
        self._told: tuple[object, Condition] = (None, Condition(usable=False))
        self.start()

    @property
    def name(self) -> str:
        """The engine's name."""
        return self.spec.name

    @property
    def busy_s(self) -> float:
        """Seconds in which it computed, over all lives."""
        return self._earlier[0] + self.engine.busy_s

    @property
    def steps(self) -> int:
        """Steps that it computed, over all lives."""
        return self._earlier[1] + self.engine.steps

    def start(self) -> None:
        """A process is ready."""
        assert not self.is_up
        spec = self.spec
        leased = int(spec.leased_max * spec.blocks)
        limits = Limits(
            spec.max_num_seqs, spec.max_num_batched_tokens, spec.max_model_len, spec.block_size, frozenset(), leased,
            spec.policy, keeps_tpot=spec.inline_prefill,
        )  # fmt: skip
        scheduler = Scheduler(limits, BlockAllocator(spec.blocks), self._model(), self._time, self._root)
        self.engine = VirtualEngine(
            self._time, scheduler, spec.times, self._deliver, self._reserved, self._refused, self._processor,
            self._stretch,
        )  # fmt: skip
        self.life += 1
        self.is_up = True

    def die(self) -> None:
        """The process is killed, with all that it has."""
        assert self.is_up
        self.is_up = False
        self._earlier = (self.busy_s, self.steps)
        self.engine.die()
        self.engine.busy_s, self.engine.steps = 0.0, 0
        calls, self.calls = self.calls, {}
        for call in dict.fromkeys(calls.values()):
            call.lost(self)

    def add(self, sequence: Sequence, call: Call) -> None:
        """A request arrives, or the announcement of one."""
        assert self.is_up
        self.calls[sequence.request_id] = call
        self.engine.add(sequence)

    def abort(self, request_id: str) -> None:
        """Nobody wants this request here any more. One that is not here is no error."""
        if self.calls.pop(request_id, None) is not None:
            self.engine.abort(request_id)

    def give_back(self, request_id: str) -> None:
        """Let a prompt that was not begun be computed elsewhere."""
        call = self.calls.pop(request_id)
        self.engine.abort(request_id)
        call.given_back(self)

    def condition(self) -> Condition:
        """What it answers to a probe."""
        if not self.is_up:
            return Condition(usable=False)
        scheduler = self.engine.scheduler
        state = (self.life, self.engine.steps, scheduler.allocator.num_free, len(scheduler.sequences))
        if state != self._told[0]:
            work = scheduler.books(self.engine.steps).work
            free = scheduler.allocator.num_free
            self.kv_peak = max(self.kv_peak, 1 - free / self.spec.blocks)
            room = free * self.spec.block_size
            self._told = (state, Condition(True, self.spec.max_num_seqs, room, work=work))
        return self._told[1]

    def audit(self) -> None:
        """Check that nothing is left of requests that have ended."""
        scheduler = self.engine.scheduler
        assert not self.calls, f"{self.name} has calls: {list(self.calls)[:3]}"
        if self.is_up:
            scheduler.audit()
            assert not scheduler.sequences, f"{self.name} has sequences: {list(scheduler.sequences)[:3]}"
            assert scheduler.allocator.num_free == self.spec.blocks, f"{self.name} has blocks in use"

    def _deliver(self, outcome: Outcome) -> None:
        calls = self.calls
        for withdrawn in outcome.withdrawn:
            if (call := calls.get(withdrawn.request_id)) is not None:
                call.withdrawn(self)
        for done in outcome.progress:
            if (call := calls.get(done.request_id)) is not None:
                call.progress(self, done)
        for held in outcome.held:
            if (call := calls.get(held.request_id)) is not None:
                call.held(self, held)
        for token in outcome.tokens:
            # A request that is given up during a step may still have a token of it.
            call = calls.pop(token.request_id, None) if token.finish_reason else calls.get(token.request_id)
            if call is not None:
                call.token(self, token)

    def _reserved(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if (call := self.calls.get(sequence.request_id)) is not None:
                call.reserved(self, sequence)

    def _refused(self, failed: Failed) -> None:
        self.calls.pop(failed.request_id).refused(self, failed)
