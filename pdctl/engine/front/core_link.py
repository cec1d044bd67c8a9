"""The front's end of the link to its core: spawn it, talk to it, notice its death."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import zmq
import zmq.asyncio

from pdctl.engine import link
from pdctl.engine.messages import (
    Abort,
    Books,
    Failed,
    FromCore,
    Held,
    Pulled,
    Ready,
    Refused,
    Reserved,
    Shutdown,
    StepDone,
    Submit,
    ToCore,
    Token,
)
from pdctl.engine.options import EngineOptions

_log = logging.getLogger(__name__)

# What a request's reader may find in its queue. Bounded by max_model_len tokens per request.
RequestEvent = Token | Held | Failed | Reserved | Pulled


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
        self.books = Books(0, 0, 0, 0, 0, 0)
        self.tokens_total = 0
        self._closing = False
        self._options = options
        self._encode = msgspec.msgpack.Encoder().encode
        self._requests: dict[str, asyncio.Queue[RequestEvent]] = {}
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
                        message.num_blocks * message.block_bytes / 2**30, message.endpoint.transport,
                    )  # fmt: skip
                    self.books = Books(message.num_blocks, 0, 0, 0, 0, 0)
                case Refused(reason):
                    raise CoreRefused(reason)

    async def send(self, message: ToCore) -> None:
        """Queue a message for the core; FIFO."""
        await self._push.send(self._encode(message))

    @asynccontextmanager
    async def request(self, submit: Submit) -> AsyncIterator[asyncio.Queue[RequestEvent]]:
        """Submit a request and read its events; on leaving, the core forgets it unless `keep` was called."""
        queue: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self._requests[submit.request_id] = queue
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

    def _step_done(self, step: StepDone) -> None:
        self.books = step.books
        self.tokens_total += len(step.tokens) + len(step.held)
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
