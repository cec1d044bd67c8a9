"""The step loop: takes messages, computes batches, sends outcomes. It uses no sockets; other threads move messages.

While a step computes, the next one is scheduled and launched if its results cannot change it (`schedule.ahead`). So at
most two steps are in flight, and messages that could change a batch are handled only when none is.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from msgspec import structs

from pdctl.engine.core.inbox import Inbox
from pdctl.engine.core.outbox import Outbox
from pdctl.engine.executor import Computed, Executor, Launched
from pdctl.engine.handover.puller import Puller
from pdctl.engine.ipc.messages import (
    Abort,
    Connect,
    Failed,
    Find,
    HandBack,
    Keep,
    Linked,
    Load,
    Look,
    Move,
    Poke,
    Pull,
    Pulled,
    Reserve,
    Reserved,
    Sampling,
    Shutdown,
    Start,
    StepDone,
    Submit,
    ToCore,
)
from pdctl.engine.model.grammar import Grammars
from pdctl.engine.schedule.batch import Outcome, Slice
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.peers.moves import unbegun
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence, Status
from pdctl.engine.tiers.tiers import Tiers

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

# Maximum wait of an idle loop, seconds.
_IDLE_WAIT_S = 1.0


class Settled(NamedTuple):
    """No transfer writes to this request's quarantined blocks any more."""

    request_id: str


class Guided(NamedTuple):
    """A request with its compiled grammar."""

    submit: Submit
    compiled: CompiledGrammar


class Flight(NamedTuple):
    """A step that computes. `began`: monotonic seconds."""

    batch: list[Slice]
    step: Launched
    began: float


CoreEvent = ToCore | Pulled | Settled | Failed | Guided


class Core:
    """The scheduler of one engine, and the loop that drives it and the executor. The puller runs in its own threads."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        grammars: Grammars,
        puller: Puller,
        inbox: Inbox[CoreEvent],
        outbox: Outbox,
        keep_latency: Callable[[LatencyModel], None] = lambda _: None,
        schedules_ahead: bool = False,
        tiers: Tiers | None = None,
    ) -> None:
        """`tiers`: None: KV is only in the pool."""
        self.scheduler = scheduler
        self.executor = executor
        self.grammars = grammars
        self.puller = puller
        self.inbox = inbox
        self.outbox = outbox
        self._keep_latency = keep_latency
        self._schedules_ahead = schedules_ahead
        self._tiers = tiers
        if tiers is not None:
            tiers.begin(scheduler, partial(report, inbox, outbox), outbox.put)
        # Held while a message is handled: by the loop between steps and, while the runner computes, by the receiving
        # thread for messages that do not concern the batch.
        self._lock = threading.Lock()
        self._is_computing = False
        self._steps = 0
        self._failed: list[Failed] = []
        self._compiling: set[str] = set()
        self._compiling_lock = threading.Lock()
        self._books_due = False
        self._empty_steps = 0

    def run(self) -> None:
        """Run steps until shutdown."""
        while self._take_messages():
            self._step()

    def close(self) -> None:
        """After `run`: close the puller, the tiers and the executor."""
        self.puller.close()
        if self._tiers is not None:
            self._tiers.close()
        self._keep_latency(self.scheduler.latency)
        self.executor.close()

    def receive(self, message: ToCore) -> None:
        """Handle a message in the receiving thread. Pulls go directly to the puller, so a running step does not delay
        them."""
        if isinstance(message, Submit) and message.sampling.grammar:
            self._compiling.add(message.request_id)
            is_wanted = partial(self._compiling.__contains__, message.request_id)
            compiled = partial(self._compiled, message)
            self.grammars.prepare(message.sampling.grammar, message.tenant, is_wanted, compiled)
        elif isinstance(message, Connect):
            self.puller.submit(message)
        elif isinstance(message, Look | Load):
            assert self._tiers is not None
            self._tiers.submit(message)
        elif not isinstance(message, Pull):
            if isinstance(message, Abort):
                with self._compiling_lock:
                    self._compiling.discard(message.request_id)
                self.puller.cancel(message.request_id)
            self.inbox.put(message)
            self._reserve_meanwhile()
        elif self.scheduler.pull_started(message.request_id):
            self.puller.submit(message)
        else:
            self.outbox.put(Pulled(message.request_id, "the request is gone", 0.0, 0))

    def _compiled(self, submit: Submit, compiled: CompiledGrammar | None, reason: str) -> None:
        """Called by a grammar thread: the request of `submit` can start, fails, or is already gone."""
        with self._compiling_lock:
            if submit.request_id in self._compiling:
                self._compiling.discard(submit.request_id)
                self.inbox.put(Failed(submit.request_id, reason) if compiled is None else Guided(submit, compiled))

    def _reserve_meanwhile(self) -> None:
        """Reserve blocks for hand-overs while a step computes. Their KV then arrives by the end of the step, instead of
        starting there and also missing the next step. Blocks of the running batch are not free, so they are safe."""
        with self._lock:
            if self._is_computing:
                self._reserve_all()

    def _reserve_all(self) -> None:
        """Handle what can be handled while a step computes, and reserve blocks for hand-overs."""
        while (message := self.inbox.take_if(_is_beside)) is not None:
            self._handle(message)
        for sequence in self.scheduler.reserve():
            self.outbox.put(Reserved(sequence.request_id, list(sequence.block_ids), sequence.num_cached))

    def _take_messages(self) -> bool:
        """Handle arrived messages; wait if there is nothing to compute. Returns False on shutdown."""
        # If two steps could not give waiting work any blocks or seats, wait for a message: only messages free them.
        stuck = self._empty_steps >= 2
        wait = (stuck or not self.scheduler.has_work) and not self._failed
        while True:
            try:
                message = self.inbox.get(timeout=_IDLE_WAIT_S if wait else 0.0)
            except queue.Empty:
                return True
            if isinstance(message, Shutdown):
                return False
            with self._lock:
                self._handle(message)
            wait = False

    def _handle(self, message: CoreEvent) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Guided(submit, compiled):
                self._submit(submit, compiled)
            case Failed(request_id):
                self.scheduler.abort(request_id)
                self._failed.append(message)
            case Abort(request_id):
                self.scheduler.abort(request_id)
            case Move():
                self.scheduler.move(message.request_id, message.offer)
            case HandBack():
                self._hand_back()
            case Reserve():
                self._reserve(message)
            case Poke():
                pass  # the counts sent below are the answer
            case _:
                self._handle_transfer(message)
        self._books_due = True

    def _handle_transfer(self, message: CoreEvent) -> None:
        match message:
            case Pulled(request_id):
                self.scheduler.pull_ended(request_id, message.uncertain)
            case Settled(request_id):
                self.scheduler.pull_settled(request_id)
            case Start(request_id):
                self.scheduler.start(request_id)
            case Keep(request_id, kv_segment, kv_tokens):
                self.scheduler.keep(request_id, kv_segment, kv_tokens)
            case Find(request_id, token_ids, salt):
                found = self.scheduler.find(request_id, token_ids, salt)
                self.executor.publish(found.block_ids)
                self.outbox.put(found)
            case _:
                raise AssertionError(f"unexpected {message}")

    def _hand_back(self) -> None:
        for name in unbegun(self.scheduler.sequences.values()):
            self.scheduler.abort(name)
            self._failed.append(Failed(name, "this engine does not prefill for others any more", elsewhere=True))

    def _reserve(self, message: Reserve) -> None:
        if message.only_now and not self.scheduler.has_room(message.kv_tokens):
            self._failed.append(Failed(message.request_id, "there is no room for KV that is not needed yet"))
            return
        sequence = Sequence(
            message.request_id, message.token_ids, 0, Sampling(1), kv_tokens=message.kv_tokens, salt=message.salt,
            status=Status.AWAITING_BLOCKS,
        )  # fmt: skip
        if failed := self.scheduler.add(sequence):
            self._failed.append(failed)

    def _submit(self, message: Submit, compiled: CompiledGrammar | None = None) -> None:
        sequence = Sequence(
            message.request_id,
            message.token_ids,
            message.prompt_len,
            message.sampling,
            hold=message.hold,
            offer=message.offer,
            kv_tokens=message.kv_tokens,
            salt=message.salt,
            priority=message.priority,
            ttft_s=message.ttft_s,
            tpot_s=message.tpot_s,
            kv_segment=message.kv_segment,
            status=Status.AWAITING_BLOCKS if message.await_kv else Status.WAITING,
        )
        if compiled is not None:
            self.grammars.begin(sequence, compiled)
        if failed := self.scheduler.add(sequence):
            self._failed.append(failed)

    def _step(self) -> None:
        """Schedule and compute a step, then those that can be scheduled ahead of the results of the one before."""
        with self._lock:
            self._reserve_all()
            batch = self.scheduler.schedule()
            self._is_computing = bool(batch)
            if not batch and (self._failed or self._books_due):
                self._tell([], None)
        self._empty_steps = 0 if batch else self._empty_steps + 1
        flight = self._launch(batch) if batch else None
        while flight is not None:
            ahead = self._launch_ahead(flight) if self._schedules_ahead else None
            ended = self._finish(flight, is_last=ahead is None)
            # A device begins with a step when the one before it has ended.
            flight = None if ahead is None else ahead._replace(began=ended)

    def _launch(self, batch: list[Slice], after: Launched | None = None) -> Flight:
        began = time.monotonic()
        return Flight(batch, self.executor.launch(batch, after), began)

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        with self._lock:
            self._reserve_all()
            batch = self.scheduler.schedule_ahead(flight.batch, self.inbox.is_empty)
        return self._launch(batch, flight.step) if batch else None

    def _finish(self, flight: Flight, is_last: bool) -> float:
        """Apply and send a step's results; returns when it had ended. `is_last`: nothing computes after it."""
        computed = flight.step.finish()
        ended = time.monotonic()
        with self._lock:
            self._is_computing = not is_last
            self.scheduler.took(flight.batch, ended - flight.began)
            self._tell(flight.batch, computed)
        return ended

    def _tell(self, batch: list[Slice], computed: Computed | None) -> None:
        """Send the step's outcome and the counts to the front."""
        outcome = Outcome()
        if computed is not None:
            outcome = self.scheduler.update(batch, *computed)
            self._steps += 1
            for block_ids in [done.block_ids for done in outcome.progress] + [done.block_ids for done in outcome.held]:
                self.executor.publish(block_ids)
        books, changes = self.scheduler.books(self._steps), self.scheduler.kv_changes()
        done = StepDone(outcome.tokens, outcome.held, self._failed, books, outcome.progress, outcome.withdrawn, changes)
        if self._tiers is not None:
            books = structs.replace(books, tiers=self._tiers.books())
            done = structs.replace(done, books=books, offloaded=self._tiers.changes())
        self.outbox.put(done)
        self._failed = []
        self._books_due = False
        if not self.scheduler.has_work:
            self.scheduler.audit()


def _is_beside(message: CoreEvent) -> bool:
    """Whether a message changes no sequence that is computed or waits for it: only those whose KV comes from a peer."""
    request = message.submit if isinstance(message, Guided) else message
    is_beside = isinstance(request, Reserve | Pulled | Settled | Poke)
    return is_beside or (isinstance(request, Submit) and request.await_kv)


def report(inbox: Inbox[CoreEvent], outbox: Outbox, message: Pulled | Linked) -> None:
    """Report a result of the puller's threads. The end of a pull goes to the loop as well as to the front."""
    if isinstance(message, Pulled):
        inbox.put(message)
    outbox.put(message)
