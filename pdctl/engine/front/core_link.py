"""The front's end of the link to its core: spawn it, talk to it, notice its death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec
import zmq
import zmq.asyncio

from pdctl.engine.handover.migration import MigrationEvent
from pdctl.engine.ipc import link
from pdctl.engine.ipc.messages import (
    Abort,
    Books,
    Failed,
    FromCore,
    Held,
    Linked,
    Poke,
    Progress,
    Pulled,
    Ready,
    Reserved,
    Shutdown,
    StartRefused,
    StepDone,
    Submit,
    ToCore,
    Token,
    Withdrawn,
)
from pdctl.engine.options import EngineOptions

_log = logging.getLogger(__name__)

# A core that has said nothing for so long is asked whether it is there, seconds.
_POKE_S = 1.0


class Note(NamedTuple):
    """What a migration's own calls found out, in one queue with what the core says: one reader, one order."""

    event: MigrationEvent
    tokens: int = 0
    detail: str = ""


# What a request's reader may find in its queue. Bounded by max_model_len tokens per request.
RequestEvent = Token | Held | Failed | Reserved | Pulled | Progress | Withdrawn | Note
Inbox = asyncio.Queue[RequestEvent]


class CoreGone(Exception):
    """The core process ended; the front must end with it."""


class CoreRefused(Exception):
    """The core said that it cannot serve, and that a restart will not help."""


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class CoreLink:
    """Messages to and from the core process."""

    def __init__(self, options: EngineOptions) -> None:
        self.ready: Ready | None = None
        self.books = Books()
        self.tokens_total = 0
        self.quarantined_block_s = 0.0
        self.on_linked: Callable[[Linked], None] = lambda _: None
        self._books_at = time.monotonic()
        self._asked_at = self._heard_at = 0.0
        self._closing = False
        self._options = options
        self._encode = msgspec.msgpack.Encoder().encode
        self._requests: dict[str, Inbox] = {}
        context = zmq.asyncio.Context()
        self._context = context
        self._push: zmq.asyncio.Socket = context.socket(zmq.PUSH)
        self._push.set_hwm(link.HIGH_WATER)
        self._push.bind(link.to_core(options.run_dir, options.name))
        self._pull: zmq.asyncio.Socket = context.socket(zmq.PULL)
        self._pull.set_hwm(link.HIGH_WATER)
        self._pull.bind(link.from_core(options.run_dir, options.name))

    async def run_core(self) -> None:
        """Start the core and wait for its end. Raises CoreGone unless we asked for it."""
        argv = [sys.executable, "-m", "pdctl.engine", "core", *self._options.to_argv()]
        process = await asyncio.create_subprocess_exec(*argv, env={**os.environ}, stdin=asyncio.subprocess.DEVNULL)
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if not self._closing:
            raise CoreGone(f"the core process ended: {_how(code)}")

    async def receive(self) -> None:
        """Hand out the core's messages until cancelled. Raises CoreRefused."""
        decode = msgspec.msgpack.Decoder(FromCore).decode
        while True:
            message = decode(await self._pull.recv())
            match message:
                case StepDone():
                    self._step_done(message)
                case Reserved() | Pulled():
                    self._deliver(message.request_id, message)
                case Ready():
                    self.ready = message
                    _log.info(
                        "ready: epoch %s, %d KV blocks of %d tokens (%.2f GiB), transport %s",
                        self._options.epoch, message.num_blocks, message.block_size,
                        message.num_blocks * message.block_bytes / 2**30,
                        ", ".join(f"{s.transport} ({s.protocol})" for s in message.endpoint.served) or "not served",
                    )  # fmt: skip
                    self.books = Books(blocks_free=message.num_blocks)
                case Linked():
                    self.on_linked(message)
                case StartRefused(reason):
                    raise CoreRefused(reason)

    async def poke_forever(self) -> None:
        """Ask a core that has been quiet for a moment whether its step loop still turns; once, until it answers."""
        while True:
            await asyncio.sleep(_POKE_S)
            now = time.monotonic()
            if self.ready is not None and not self._asked_at and now - self._heard_at > _POKE_S and not self._closing:
                self._asked_at = now
                # To a core that has just died it cannot be sent, and must not wait: the loop may end meanwhile.
                with contextlib.suppress(zmq.Again):
                    await self._push.send(self._encode(Poke()), zmq.NOBLOCK)

    @property
    def silent_s(self) -> float:
        """For how long the core has owed us a word, seconds."""
        return time.monotonic() - self._asked_at if self._asked_at else 0.0

    async def send(self, message: ToCore) -> None:
        """Queue a message for the core; FIFO."""
        await self._push.send(self._encode(message))

    def open(self, request_id: str) -> Inbox:
        """The queue of a request's events, made now if there is none."""
        return self._requests.setdefault(request_id, asyncio.Queue())

    @asynccontextmanager
    async def request(self, submit: Submit) -> AsyncIterator[Inbox]:
        """Submit a request and read its events; on leaving, the core forgets it unless `keep` was called."""
        queue = self.open(submit.request_id)
        try:
            await self.send(submit)
            yield queue
        finally:
            if self._requests.pop(submit.request_id, None) is not None:
                self.abort(submit.request_id)

    def keep(self, request_id: str) -> None:
        """The request ended by itself, or is held: nothing to abort."""
        self._requests.pop(request_id, None)

    def abort(self, request_id: str) -> None:
        """Make the core forget a request and free its blocks. Never waits, so it works while being cancelled."""
        self._push.send(self._encode(Abort(request_id)))

    async def close(self) -> None:
        """Ask the core to end and close the sockets."""
        self._closing = True
        if self.ready is not None:
            # A core that still loads has no socket yet; sending to it would wait for the load to end.
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
        for withdrawn in step.withdrawn:
            self._deliver(withdrawn.request_id, withdrawn)
        for progress in step.progress:
            self._deliver(progress.request_id, progress)
        for token in step.tokens:
            self._deliver(token.request_id, token)
        for held in step.held:
            if not self._deliver(held.request_id, held):
                # Its reader left while the last chunk was computed; the abort that it sent came too early.
                self.abort(held.request_id)
        for failed in step.failed:
            self._deliver(failed.request_id, failed)

    def _deliver(self, request_id: str, event: RequestEvent) -> bool:
        queue = self._requests.get(request_id)
        if queue is not None:
            queue.put_nowait(event)
        return queue is not None
