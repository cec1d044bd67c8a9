"""The core process: loads the model, then steps. Threads move messages; the step loop touches no socket."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time

import msgspec
import torch
import zmq

from pdctl.engine import link
from pdctl.engine.blocks import BlockAllocator
from pdctl.engine.kv_pool import DTYPES, KvPool
from pdctl.engine.layout import block_bytes, spans
from pdctl.engine.lifeline import die_with_parent
from pdctl.engine.loading import LoadedModel, ModelRefused, load_model
from pdctl.engine.messages import (
    Abort,
    Failed,
    FromCore,
    Pull,
    Pulled,
    Ready,
    Refused,
    Reserved,
    Shutdown,
    Start,
    StepDone,
    Submit,
    ToCore,
)
from pdctl.engine.options import EngineOptions
from pdctl.engine.runner import ModelRunner
from pdctl.engine.scheduler import Limits, Scheduler
from pdctl.engine.sequence import Sequence, Status
from pdctl.engine.transfer import TransferError, Transport, choose, transport_kind
from pdctl.host.memory import read_memory
from pdctl.wire import EXIT_CONFIG, Manifest, PoolEndpoint

# How long an idle loop waits before it looks around again, seconds.
_IDLE_WAIT_S = 1.0
# How often a transfer thread without work lets go of dead peers' memory, seconds.
_PRUNE_S = 2.0


class Core:
    """Scheduler, runner and transport of one engine, and the loop that drives them."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, transport: Transport, outbox: Outbox) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.transport = transport
        self.outbox = outbox
        self.inbox: queue.SimpleQueue[ToCore | Pulled] = queue.SimpleQueue()
        self.pulls: queue.SimpleQueue[Pull | None] = queue.SimpleQueue()
        self._steps = 0
        self._failed: list[Failed] = []

    def run(self) -> None:
        """Step until told to shut down."""
        while self._take_messages():
            for sequence in self.scheduler.reserve():
                self.outbox.put(Reserved(sequence.request_id, list(sequence.block_ids)))
            self._step()

    def receive(self, message: ToCore) -> None:
        """Called by the receiving thread. A pull goes straight to the transfer thread: no step delays it."""
        if not isinstance(message, Pull):
            self.inbox.put(message)
        elif self.scheduler.pull_started(message.request_id):
            self.pulls.put(message)
        else:
            self.outbox.put(Pulled(message.request_id, "the request is gone", 0.0, 0))

    def pull_loop(self) -> None:
        """The transfer thread."""
        while True:
            try:
                pull = self.pulls.get(timeout=_PRUNE_S)
            except queue.Empty:
                self.transport.prune()
                continue
            if pull is None:
                return
            started = time.perf_counter()
            error, moved = "", 0
            try:
                moved = self._pull(pull)
            except (TransferError, ValueError) as failure:
                error = str(failure)
            pulled = Pulled(pull.request_id, error, time.perf_counter() - started, moved)
            self.inbox.put(pulled)
            self.outbox.put(pulled)

    def _pull(self, pull: Pull) -> int:
        ours, peer = self.runner.pool, pull.endpoint
        if peer.manifest != ours.manifest:
            raise TransferError("the peer's KV pool differs in model, dtype, block size or shape")
        todo = spans(ours.manifest, pull.source_blocks, peer.num_blocks, pull.target_blocks, ours.num_blocks)
        return self.transport.read(peer.address, block_bytes(peer.manifest) * peer.num_blocks, todo)

    def _take_messages(self) -> bool:
        """Handle what has arrived; wait a little when there is nothing to compute. False to end."""
        wait = not self.scheduler.has_work and not self._failed
        while True:
            try:
                message = self.inbox.get(timeout=_IDLE_WAIT_S) if wait else self.inbox.get_nowait()
            except queue.Empty:
                return True
            if isinstance(message, Shutdown):
                return False
            self._handle(message)
            wait = False

    def _handle(self, message: ToCore | Pulled) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort(request_id):
                self.scheduler.abort(request_id)
            case Pulled(request_id, error):
                if not error:
                    self.runner.pool.absorb(self.scheduler.allocator.owned(request_id))
                self.scheduler.pull_ended(request_id)
            case Start(request_id):
                self.scheduler.start(request_id)
            case _:
                raise AssertionError(f"unexpected {message}")
        self._books_due = True

    _books_due = False

    def _submit(self, message: Submit) -> None:
        sequence = Sequence(
            message.request_id,
            message.token_ids,
            message.prompt_len,
            message.sampling,
            hold=message.hold,
            kv_tokens=message.kv_tokens,
            status=Status.AWAITING_BLOCKS if message.await_kv else Status.WAITING,
        )
        if failed := self.scheduler.add(sequence):
            self._failed.append(failed)

    def _step(self) -> None:
        batch = self.scheduler.schedule()
        if not batch and not self._failed and not self._books_due:
            return
        tokens, held = [], []
        if batch:
            outcome = self.scheduler.update(batch, self.runner.execute(batch))
            tokens, held = outcome.tokens, outcome.held
            self._steps += 1
            for done in held:
                self.runner.pool.publish(done.block_ids)
        self.outbox.put(StepDone(tokens, held, self._failed, self.scheduler.books(self._steps)))
        self._failed = []
        self._books_due = False
        if not self.scheduler.has_work:
            self.scheduler.audit()


class Outbox:
    """Messages to the front; any thread may put, one thread sends."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._queue: queue.SimpleQueue[FromCore | None] = queue.SimpleQueue()
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(link.HIGH_WATER)
        self._socket.connect(address)
        self._thread = threading.Thread(target=self._send, name="outbox", daemon=True)
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
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outbox = Outbox(context, link.from_core(options.run_dir, options.name))
    try:
        core, ready = _build(options, outbox)
    except (ModelRefused, TransferError, torch.OutOfMemoryError) as failure:
        outbox.put(Refused(str(failure)))
        outbox.close()
        return EXIT_CONFIG
    inbound = context.socket(zmq.PULL)
    inbound.set_hwm(link.HIGH_WATER)
    inbound.connect(link.to_core(options.run_dir, options.name))
    threading.Thread(target=_receive, args=(inbound, core), name="inbox", daemon=True).start()
    puller = threading.Thread(target=core.pull_loop, name="transfer", daemon=True)
    puller.start()
    outbox.put(ready)
    core.run()
    core.pulls.put(None)
    puller.join(timeout=2)
    core.transport.close()
    outbox.close()
    # Threads may still sit in zmq; everything that matters has been said.
    sys.stdout.flush()
    os._exit(0)


def _receive(socket: zmq.Socket[bytes], core: Core) -> None:
    decode = msgspec.msgpack.Decoder(ToCore).decode
    while True:
        core.receive(decode(socket.recv()))


def _build(options: EngineOptions, outbox: Outbox) -> tuple[Core, Ready]:
    """Everything that can be refused. Raises ModelRefused or TransferError."""
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
    name = choose(options.transfer)
    kind = transport_kind(name)
    region = kind.allocate(num_blocks * block_bytes(manifest), options.epoch)
    pool = KvPool(manifest, num_blocks, region, device)
    runner = ModelRunner(loaded, pool, device)
    runner.self_check()
    limits = _limits(options, loaded)
    scheduler = Scheduler(limits, BlockAllocator(num_blocks))
    core = Core(scheduler, runner, kind.open_transport(region), outbox)
    ready = Ready(
        endpoint=PoolEndpoint(name, region.address, num_blocks, manifest),
        num_blocks=num_blocks,
        block_size=options.block_size,
        block_bytes=block_bytes(manifest),
        max_model_len=limits.max_model_len,
        vocab_size=loaded.vocab_size,
    )
    return core, ready


def _limits(options: EngineOptions, loaded: LoadedModel) -> Limits:
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
    )
