"""The core process: loads the model, then steps. Threads move messages; the step loop touches no socket."""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
import zmq

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.cache.kv_pool import DTYPES, KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory, NoMemory
from pdctl.engine.core.inbox import Inbox
from pdctl.engine.handover.puller import PoolShape, Puller
from pdctl.engine.ipc import link
from pdctl.engine.ipc.messages import (
    Abort,
    Connect,
    Failed,
    FromCore,
    Linked,
    Logprobs,
    Poke,
    Pull,
    Pulled,
    Ready,
    Reserve,
    Reserved,
    Sampling,
    Shutdown,
    Start,
    StartRefused,
    StepDone,
    Submit,
    ToCore,
)
from pdctl.engine.lifeline import die_with_parent, vital
from pdctl.engine.model.grammar import Grammars
from pdctl.engine.model.loading import LoadedModel, ModelRefused, load_model
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.options import EngineOptions
from pdctl.engine.schedule.scheduler import Limits, Outcome, Scheduler, Slice
from pdctl.engine.schedule.sequence import Sequence, Status
from pdctl.engine.transfer import Settings, TransferError, Transport, transport_kind
from pdctl.host.boot import host_id
from pdctl.host.memory import read_memory
from pdctl.net.serving import LOG_FORMAT
from pdctl.wire import EXIT_CONFIG, Manifest, PoolEndpoint, Served

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

# How long an idle loop waits before it looks around again, seconds.
_IDLE_WAIT_S = 1.0
# Debug switch: freed blocks are filled with NaN, and a NaN among the logits ends the engine.
POISON_ENV = "PDCTL_POISON_FREED"


class Settled(NamedTuple):
    """Nothing writes into this request's quarantined blocks any more."""

    request_id: str


class Guided(NamedTuple):
    """A request whose grammar is compiled."""

    submit: Submit
    compiled: CompiledGrammar


class Core:
    """Scheduler and runner of one engine, and the loop that drives them. The puller works beside it."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, outbox: Outbox) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.outbox = outbox
        self.inbox: Inbox[_CoreEvent] = Inbox()
        self.puller: Puller | None = None
        # Whoever handles a message holds the lock: the loop between steps; while the runner computes, the receiving
        # thread, for messages that only wait for blocks.
        self._lock = threading.Lock()
        self._is_computing = False
        self._steps = 0
        self._failed: list[Failed] = []
        self._compiling: set[str] = set()
        self._compiling_lock = threading.Lock()
        self._books_due = False
        self._empty_steps = 0

    def run(self) -> None:
        """Step until told to shut down."""
        while self._take_messages():
            self._step()

    def receive(self, message: ToCore) -> None:
        """Called by the receiving thread. Pulls go straight to the puller: no step delays them."""
        assert self.puller is not None
        if isinstance(message, Submit) and message.sampling.grammar:
            self._compiling.add(message.request_id)
            is_wanted = partial(self._compiling.__contains__, message.request_id)
            compiled = partial(self._compiled, message)
            self.runner.grammars.prepare(message.sampling.grammar, message.tenant, is_wanted, compiled)
        elif isinstance(message, Connect):
            self.puller.submit(message)
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
        """Called by a grammar thread: its request may begin, or fails, or is gone by now."""
        with self._compiling_lock:
            if submit.request_id in self._compiling:
                self._compiling.discard(submit.request_id)
                self.inbox.put(Failed(submit.request_id, reason) if compiled is None else Guided(submit, compiled))

    def report(self, message: Pulled | Linked) -> None:
        """Called by the puller's threads."""
        if isinstance(message, Pulled):
            self.inbox.put(message)
        self.outbox.put(message)

    def _reserve_meanwhile(self) -> None:
        """While a step computes, hand-overs get their blocks at once: their KV is here when the step is over, instead
        of beginning then and missing the next one as well. No block of the batch is free, so none is given away."""
        with self._lock:
            if self._is_computing:
                self._reserve_all()

    def _reserve_all(self) -> None:
        while (message := self.inbox.take_if(_only_waits)) is not None:
            self._handle(message)
        for sequence in self.scheduler.reserve():
            self.outbox.put(Reserved(sequence.request_id, list(sequence.block_ids)))

    def _take_messages(self) -> bool:
        """Handle what has arrived; wait a little when there is nothing to compute. False to end."""
        # Work that twice could not be given blocks or a seat waits for whoever frees them: all of that arrives here.
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

    def _handle(self, message: _CoreEvent) -> None:
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
            case Reserve(request_id, kv_tokens):
                self._reserve(request_id, kv_tokens)
            case Pulled(request_id):
                self.scheduler.pull_ended(request_id, message.uncertain)
            case Settled(request_id):
                self.scheduler.pull_settled(request_id)
            case Start(request_id):
                self.runner.pool.absorb(self.scheduler.allocator.owned(request_id))
                self.scheduler.start(request_id)
            case Poke():
                pass  # the books that follow are the answer
            case _:
                raise AssertionError(f"unexpected {message}")
        self._books_due = True

    def _reserve(self, request_id: str, kv_tokens: int) -> None:
        sequence = Sequence(request_id, [], 0, Sampling(1), kv_tokens=kv_tokens, status=Status.AWAITING_BLOCKS)
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
            status=Status.AWAITING_BLOCKS if message.await_kv else Status.WAITING,
        )
        if compiled is not None:
            self.runner.grammars.begin(sequence, compiled)
        if failed := self.scheduler.add(sequence):
            self._failed.append(failed)

    def _step(self) -> None:
        with self._lock:
            self._reserve_all()
            batch = self.scheduler.schedule()
            self._is_computing = bool(batch)
        self._empty_steps = 0 if batch else self._empty_steps + 1
        computed = self.runner.execute(batch) if batch else None
        with self._lock:
            self._is_computing = False
            if computed is not None or self._failed or self._books_due:
                self._tell(batch, computed)

    def _tell(self, batch: list[Slice], computed: tuple[list[int], list[Logprobs | None]] | None) -> None:
        """The step's outcome and the books to the front."""
        outcome = Outcome()
        if computed is not None:
            outcome = self.scheduler.update(batch, *computed)
            self._steps += 1
            for block_ids in [done.block_ids for done in outcome.progress] + [done.block_ids for done in outcome.held]:
                self.runner.pool.publish(block_ids)
        books = self.scheduler.books(self._steps)
        self.outbox.put(
            StepDone(outcome.tokens, outcome.held, self._failed, books, outcome.progress, outcome.withdrawn)
        )
        self._failed = []
        self._books_due = False
        if not self.scheduler.has_work:
            self.scheduler.audit()


def _only_waits(message: _CoreEvent) -> bool:
    """Whether a message adds a sequence that only waits for blocks, and touches no other."""
    request = message.submit if isinstance(message, Guided) else message
    return isinstance(request, Reserve) or (isinstance(request, Submit) and request.await_kv)


_CoreEvent = ToCore | Pulled | Settled | Failed | Guided


class Outbox:
    """Messages to the front; any thread may put, one thread sends."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._queue: queue.SimpleQueue[FromCore | None] = queue.SimpleQueue()
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(link.HIGH_WATER)
        self._socket.connect(address)
        self._thread = threading.Thread(target=vital(self._send), name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: FromCore) -> None:
        """Queue a message."""
        self._queue.put(message)

    def close(self) -> None:
        """Send what is queued, then stop."""
        self._queue.put(None)
        self._thread.join(timeout=2)
        self._socket.close(linger=500)

    def _send(self) -> None:
        encode = msgspec.msgpack.Encoder().encode
        while (message := self._queue.get()) is not None:
            self._socket.send(encode(message))


def main(options: EngineOptions) -> int:
    """Load, announce, step. Returns the exit code."""
    die_with_parent(signal.SIGKILL, options.front_pid)
    # The front decides when we end; a Ctrl-C of the terminal must not cut a step short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outbox = Outbox(context, link.from_core(options.run_dir, options.name))
    try:
        core, ready = _build(options, outbox)
    except (ModelRefused, NoMemory, TransferError, torch.OutOfMemoryError) as failure:
        outbox.put(StartRefused(str(failure)))
        outbox.close()
        return EXIT_CONFIG
    # The model stays too: no collection between two steps looks through it.
    gc.collect()
    gc.freeze()
    inbound = context.socket(zmq.PULL)
    inbound.set_hwm(link.HIGH_WATER)
    inbound.connect(link.to_core(options.run_dir, options.name))
    threading.Thread(target=vital(lambda: _receive(inbound, core)), name="inbox", daemon=True).start()
    outbox.put(ready)
    core.run()
    assert core.puller is not None
    core.puller.close()
    core.runner.grammars.close()
    outbox.close()
    # Threads may still sit in zmq; everything that matters has been said.
    sys.stdout.flush()
    os._exit(0)


def _receive(socket: zmq.Socket[bytes], core: Core) -> None:
    decode = msgspec.msgpack.Decoder(ToCore).decode
    while True:
        core.receive(decode(socket.recv()))


def _build(options: EngineOptions, outbox: Outbox) -> tuple[Core, Ready]:
    """Everything that can be refused. Raises ModelRefused, NoMemory or TransferError."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    loaded = load_model(options.model, device, dtype)
    manifest = Manifest(loaded.fingerprint, loaded.dtype, options.block_size, loaded.shapes)
    assert loaded.dtype in DTYPES
    num_blocks = int(options.kv_cache_gb * 2**30) // block_bytes(manifest)
    if num_blocks < 8:
        raise ModelRefused(
            f"kv_cache_gb = {options.kv_cache_gb:g} holds {num_blocks} blocks of {block_bytes(manifest)} bytes; "
            f"raise it to {8 * block_bytes(manifest) / 2**30:.3g} at least, for 8 blocks"
        )
    _, available = read_memory()
    if num_blocks * block_bytes(manifest) > available:
        raise ModelRefused(
            f"kv_cache_gb = {options.kv_cache_gb:g} does not fit: {available / 2**30:.1f} GiB of memory are free"
        )
    memory = Memory(num_blocks * block_bytes(manifest), options.epoch)
    transports = _open_transports(options, memory)
    pool = KvPool(manifest, num_blocks, memory, device)
    poison = pool.poison if os.environ.get(POISON_ENV) else None
    grammars = Grammars(Path(options.model), loaded.vocab_size, loaded.eos_token_ids)
    runner = ModelRunner(loaded, pool, device, poison is not None, grammars)
    runner.self_check()
    limits = _limits(options, loaded, num_blocks)
    core = Core(Scheduler(limits, BlockAllocator(num_blocks, poison)), runner, outbox)
    ours = PoolShape(manifest, num_blocks, host_id(), options.transfer, options.read_s)
    core.puller = Puller(ours, transports, core.report, lambda request_id: core.inbox.put(Settled(request_id)))
    served = [Served(t.name, t.address, t.protocol, t.fallback) for t in transports.values() if t.address]
    ready = Ready(
        endpoint=PoolEndpoint(ours.host_id, served, num_blocks, manifest),
        num_blocks=num_blocks,
        block_size=options.block_size,
        block_bytes=block_bytes(manifest),
        max_model_len=limits.max_model_len,
        vocab_size=loaded.vocab_size,
    )
    return core, ready


def _open_transports(options: EngineOptions, memory: Memory) -> dict[str, Transport]:
    """Those that the topology names; `auto` is shared memory, for all engines of a topology are on this host.

    Raises TransferError.
    """
    settings = Settings(
        epoch=options.epoch,
        protocol=options.transfer_protocol,
        devices=tuple(filter(None, options.transfer_devices.split(","))),
        ports=options.port_range,
        serving=options.role != "decode",
    )
    names = ["shm"] if options.transfer == "auto" else [options.transfer]
    found = {}
    for name in names:
        transport = transport_kind(name).open_transport(memory, settings)
        if transport.fallback:
            logging.warning("%s: %s; %s is used", name, transport.fallback, transport.protocol)
        if name == "mooncake":
            logging.warning("mooncake listens on every interface and asks nobody who they are: firewall its ports")
        found[name] = transport
    return found


def _limits(options: EngineOptions, loaded: LoadedModel, num_blocks: int) -> Limits:
    if options.max_model_len > loaded.max_positions:
        raise ModelRefused(
            f"max_model_len = {options.max_model_len} is more than the model's {loaded.max_positions} positions"
        )
    return Limits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        block_size=options.block_size,
        eos_token_ids=loaded.eos_token_ids,
        max_leased_blocks=int(options.leased_max * num_blocks),
    )
