"""The front's end of the link to its core: start it, exchange messages, detect its death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec
import zmq
import zmq.asyncio

from pdctl.engine.handover.reception import ReceptionEvent
from pdctl.engine.ipc import pipes
from pdctl.engine.ipc.messages import (
    Abort,
    Books,
    Broken,
    Failed,
    Found,
    FromCore,
    HandBack,
    Held,
    KvChange,
    Linked,
    Move,
    Poke,
    Progress,
    Pulled,
    Ready,
    Reserved,
    Seen,
    Shutdown,
    StartRefused,
    StepDone,
    Submit,
    ToCore,
    Token,
    Withdrawn,
)
from pdctl.engine.options import EngineOptions
from pdctl.host import program
from pdctl.net.pauses import Sleeper
from pdctl.wire import KvEndpoint

_log = logging.getLogger(__name__)

# A core that has sent nothing for this long is poked, seconds.
_POKE_S = 1.0
# Wait for the reason of a core that ended by itself, at most; its message is sent before it ends.
_LAST_WORDS_S = 0.5


class Note(NamedTuple):
    """A result of a reception's own call. It goes into the same queue as core messages, so that there is one order."""

    event: ReceptionEvent
    tokens: int = 0
    detail: str = ""


# Events in a request's queue. Their number is limited by max_model_len per request.
RequestEvent = Token | Held | Failed | Reserved | Found | Seen | Pulled | Progress | Withdrawn | Note
RequestEvents = asyncio.Queue[RequestEvent]


class CoreGone(Exception):
    """The core process exited; the front must exit too."""


class CoreRefused(Exception):
    """The core reported that it cannot serve and that a restart would not help."""


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class CoreClient:
    """Messages to and from the core process."""

    def __init__(self, options: EngineOptions) -> None:
        self.ready: Ready | None = None
        self.books = Books()
        self.tokens_total = 0
        self.quarantined_block_s = 0.0
        self.on_linked: Callable[[Linked], None] = lambda _: None
        self.on_kv_changes: list[Callable[[list[KvChange]], None]] = []
        self.on_offloaded: Callable[[list[bytes], list[bytes]], None] = lambda came, went: None
        self._books_at = time.monotonic()
        self._asked_at = self._heard_at = 0.0
        self._closing = False
        self._why = ""
        self._broken = asyncio.Event()
        self._options = options
        self._encode = msgspec.msgpack.Encoder().encode
        self._requests: dict[str, RequestEvents] = {}
        context = zmq.asyncio.Context()
        self._context = context
        self._push: zmq.asyncio.Socket = context.socket(zmq.PUSH)
        self._push.set_hwm(pipes.HIGH_WATER)
        self._push.bind(pipes.to_core(options.run_dir, options.name))
        self._pull: zmq.asyncio.Socket = context.socket(zmq.PULL)
        self._pull.set_hwm(pipes.HIGH_WATER)
        self._pull.bind(pipes.from_core(options.run_dir, options.name))

    @property
    def endpoint(self) -> KvEndpoint:
        """Where this engine's KV can be read; of an engine that is ready."""
        assert self.ready is not None
        return self.ready.endpoint

    async def run_core(self) -> None:
        """Start the core and wait until it exits. Raises CoreGone unless the front requested it."""
        argv = program.this_engine("core", *self._options.to_argv())
        process = await asyncio.create_subprocess_exec(*argv, env={**os.environ}, stdin=asyncio.subprocess.DEVNULL)
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if not self._closing:
            if code > 0:
                # It may have said why; a killed one has not.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._broken.wait(), _LAST_WORDS_S)
            raise CoreGone(self._why or f"the core process ended: {_how(code)}")

    async def receive(self) -> None:
        """Distribute the core's messages until cancelled. Raises CoreRefused."""
        decode = msgspec.msgpack.Decoder(FromCore).decode
        while True:
            message = decode(await self._pull.recv())
            match message:
                case StepDone():
                    self._step_done(message)
                case Reserved() | Found() | Seen() | Pulled():
                    self._deliver(message.request_id, message)
                case Ready():
                    self.ready = message
                    served = message.endpoint.shards[0].served
                    _log.info(
                        "ready: epoch %s, %d KV blocks of %d tokens (%.2f GiB), transport %s, attention %s",
                        self._options.epoch, message.num_blocks, message.block_size,
                        message.num_blocks * message.block_bytes / 2**30,
                        ", ".join(f"{s.transport} ({s.protocol})" for s in served) or "not served",
                        message.attention,
                    )  # fmt: skip
                    self.books = Books(blocks_free=message.num_blocks)
                case Linked():
                    self.on_linked(message)
                case Broken(reason):
                    self._why = reason
                    self._broken.set()
                case StartRefused(reason):
                    raise CoreRefused(reason)

    async def poke_forever(self) -> None:
        """Poke a quiet core to check that its step loop is running; only once until it answers."""
        sleeper = Sleeper()
        while True:
            stood_still = await sleeper.overslept(_POKE_S)
            now = time.monotonic()
            if stood_still and self._asked_at:
                self._asked_at = now
            if self.ready is not None and not self._asked_at and now - self._heard_at > _POKE_S and not self._closing:
                self._asked_at = now
                # Sending to a core that has just died would block; this must not wait.
                with contextlib.suppress(zmq.Again):
                    await self._push.send(self._encode(Poke()), zmq.NOBLOCK)

    @property
    def silent_s(self) -> float:
        """Seconds for which the core has not answered a message; 0 if none is pending."""
        return time.monotonic() - self._asked_at if self._asked_at else 0.0

    async def send(self, message: ToCore) -> None:
        """Queue a message for the core; FIFO."""
        await self._push.send(self._encode(message))

    def open(self, request_id: str) -> RequestEvents:
        """The queue of a request's events, created if needed."""
        return self._requests.setdefault(request_id, asyncio.Queue())

    @asynccontextmanager
    async def request(self, submit: Submit) -> AsyncIterator[RequestEvents]:
        """Submit a request and read its events. On leaving, the request is aborted in the core unless `keep` was
        called."""
        queue = self.open(submit.request_id)
        try:
            await self.send(submit)
            yield queue
        finally:
            if self._requests.pop(submit.request_id, None) is not None:
                self.abort(submit.request_id)

    def keep(self, request_id: str) -> None:
        """Do not abort the request on leaving: it has ended or is held."""
        self._requests.pop(request_id, None)

    def abort(self, request_id: str) -> None:
        """Abort a request in the core and free its blocks. Never blocks, so it works during cancellation."""
        self._push.send(self._encode(Abort(request_id)))

    def move(self, request_id: str) -> None:
        """Have a sequence held for another engine, and its KV so far offered. Never blocks."""
        self._push.send(self._encode(Move(request_id, offer=True)))

    def hand_back(self) -> None:
        """Have the prompts for peers that were not begun fail, so that their router sends them elsewhere. Never
        blocks."""
        self._push.send(self._encode(HandBack()))

    async def close(self) -> None:
        """Ask the core to exit, and close the sockets."""
        self._closing = True
        if self.ready is not None:
            # A core that is still loading has no socket yet: sending would wait until it has loaded.
            await self.send(Shutdown())
        self._push.close(linger=500)
        self._pull.close(linger=0)
        self._context.term()

    def quarantined_block_seconds(self) -> float:
        """Quarantined blocks times seconds so far."""
        now = time.monotonic()
        self.quarantined_block_s += self.books.blocks_quarantined * (now - self._books_at)
        self._books_at = now
        return self.quarantined_block_s

    def _step_done(self, step: StepDone) -> None:
        self.quarantined_block_seconds()
        self._asked_at, self._heard_at = 0.0, time.monotonic()
        self.books = step.books
        self.tokens_total += len(step.tokens) + len(step.held)
        if step.kv_changes:
            for take in self.on_kv_changes:
                take(step.kv_changes)
        if any(step.offloaded):
            self.on_offloaded(*step.offloaded)
        for withdrawn in step.withdrawn:
            self._deliver(withdrawn.request_id, withdrawn)
        for progress in step.progress:
            self._deliver(progress.request_id, progress)
        for token in step.tokens:
            self._deliver(token.request_id, token)
        for held in step.held:
            if not self._deliver(held.request_id, held):
                # The request was abandoned while its last chunk was computed, and its abort came too early.
                self.abort(held.request_id)
        for failed in step.failed:
            self._deliver(failed.request_id, failed)

    def _deliver(self, request_id: str, event: RequestEvent) -> bool:
        queue = self._requests.get(request_id)
        if queue is not None:
            queue.put_nowait(event)
        return queue is not None
