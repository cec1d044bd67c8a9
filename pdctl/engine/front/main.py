"""The front process: connects its parts and runs them until it is stopped or the core exits."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from pdctl.engine.front.api.control import Control
from pdctl.engine.front.api.generate import Generator
from pdctl.engine.front.api.parsers import choose
from pdctl.engine.front.api.service import EngineService
from pdctl.engine.front.api.text import TextCodec
from pdctl.engine.front.core_client import CoreClient, CoreGone, CoreRefused
from pdctl.engine.front.handover.lease_desk import LeaseDesk
from pdctl.engine.front.handover.links import LinkBook
from pdctl.engine.front.handover.moves import Moves
from pdctl.engine.front.handover.offers import Identity, OfferDesk
from pdctl.engine.front.handover.peers import Peers
from pdctl.engine.front.handover.receiver import Receiver
from pdctl.engine.front.handover.role import RoleDesk
from pdctl.engine.front.handover.trace import Trace
from pdctl.engine.front.kv_events import KvEvents
from pdctl.engine.front.prefixes.desk import prefix_desk
from pdctl.engine.front.routers.desk import RouterDesk
from pdctl.engine.front.routers.seal import Seal
from pdctl.engine.front.routers.transfers import Transfers
from pdctl.engine.front.spans import EngineSpans
from pdctl.engine.handover.lease import LeaseTable
from pdctl.engine.options import EngineOptions
from pdctl.errors import PdctlError, first_of
from pdctl.host.boot import new_epoch
from pdctl.net.identity import own_identity
from pdctl.net.identity.peers import NodesOnly
from pdctl.net.prompt_protocol import PromptProtocol
from pdctl.net.serving import LOG_FORMAT, Server, listen_tcp, wants_certificates
from pdctl.wire import EPOCH_ENV, EXIT_CONFIG, SECRET_ENV

if TYPE_CHECKING:
    from pdctl.net.identity.contexts import Identity as NodeIdentity

# Running streams may finish for this long after SIGTERM, seconds.
_DRAIN_S = 5


_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """Ends the task group after the server has shut down."""


def main(options: EngineOptions) -> int:
    """Run one engine. Returns the exit code: 0 stopped, 78 cannot be served, 1 the core died."""
    epoch = os.environ.get(EPOCH_ENV) or new_epoch()
    options = dataclasses.replace(options, epoch=epoch, front_pid=os.getpid())
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    _log.info("loading %s on %s", options.model, options.device)
    (options.run_dir / "ipc").mkdir(parents=True, exist_ok=True)
    try:
        codec = TextCodec(Path(options.model))
    except Exception as failure:  # noqa: BLE001 - tokenizers raises bare Exception for every unreadable file
        return _fail(f"{options.model} has no usable tokenizer.json: {failure}", EXIT_CONFIG)
    try:
        spans, node = EngineSpans(options), own_identity()
    except PdctlError as failure:
        return _fail(str(failure), EXIT_CONFIG)
    code = 0
    try:
        asyncio.run(_run(options, codec, spans, node))
    except* CoreRefused as refused:
        code = _fail(str(first_of(refused)), EXIT_CONFIG)
    except* (CoreGone, OSError) as failure:
        code = _fail(str(first_of(failure)), 1)
    except* _Stopped:
        pass
    return code


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


async def _run(options: EngineOptions, codec: TextCodec, spans: EngineSpans, node: NodeIdentity | None) -> None:
    listener = _listen(options.host, options.port)
    secret = os.environ.get(SECRET_ENV, "")
    trace = Trace(options.name, options.epoch)
    core = CoreClient(options)
    events = KvEvents(options) if options.kv_events != "off" else None
    leases = LeaseDesk(LeaseTable(options.epoch, options.lease_s), core, trace)
    peers = Peers(f"{options.name}@{options.epoch}", secret, node.client_context if node is not None else None)
    links = LinkBook(peers, core)
    async with asyncio.TaskGroup() as tasks:
        receiver = Receiver(peers, core, links, trace, tasks)
        identity = Identity(options.name, options.epoch, options.host, options.port, options.lease_s)
        desk = OfferDesk(identity, core, leases, peers, tasks)
        prefixes = prefix_desk(options, core, leases, desk, peers, links, receiver, tasks)
        core.on_kv_changes = [
            *([events.take] if events is not None else []),
            *([prefixes.take] if prefixes is not None else []),
        ]
        if prefixes is not None:
            core.on_offloaded = prefixes.take_offloaded
        seal = Seal(secret)
        routers = RouterDesk(seal, leases, links, peers)
        moves = Moves(core)
        control = Control(
            options, secret, core, leases, links, receiver, moves, RoleDesk(core), routers, events, prefixes
        )
        parsers = choose(options.tool_parser, options.reasoning_parser, codec.template)
        generator = Generator(codec, parsers, core, desk, peers, receiver, moves, prefixes)
        transfers = Transfers(seal, options.open and bool(secret))
        service = EngineService(options, codec, core, control, generator, transfers, routers, spans)
        server = _server(options, service.app(), node, prefixes.close if prefixes is not None else lambda: None)
        core_task = tasks.create_task(core.run_core())
        tasks.create_task(core.receive())
        tasks.create_task(core.poke_forever())
        tasks.create_task(leases.expire_forever())
        tasks.create_task(receiver.renew_forever())
        tasks.create_task(peers.release_forever())
        if events is not None:
            tasks.create_task(events.replay_forever())
        await server.serve(sockets=[listener])
        await core.close()
        peers.close()
        trace.close()
        await spans.close()
        # A core that is still loading cannot receive messages; it is killed when its task is cancelled.
        await asyncio.wait([core_task], timeout=_DRAIN_S if core.ready else 0)
        if events is not None:
            events.close()
        raise _Stopped


def _server(options: EngineOptions, app: ASGIApp, node: NodeIdentity | None, before_end: Callable[[], None]) -> Server:
    """`before_end`: ends calls that would wait for long."""
    if node is not None:
        app = NodesOnly(app, node.who.service)
    config = uvicorn.Config(
        app, host=options.host, port=options.port, log_level="warning", access_log=False,
        timeout_keep_alive=75, timeout_graceful_shutdown=_DRAIN_S, lifespan="off", loop="none",
        http=PromptProtocol, ws="none", proxy_headers=False, ssl_context_factory=wants_certificates(node),
    )  # fmt: skip
    server = Server(config)
    for sign in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sign, _stop, server, before_end)
    return server


def _listen(host: str, port: int) -> socket.socket:
    """Bind before the model loads, so that a port in use is detected at once. Raises OSError."""
    try:
        return listen_tcp(host, port)
    except OSError as failure:
        raise OSError(f"port {port} on {host} cannot be bound: {failure.strerror}") from failure


def _stop(server: uvicorn.Server, before_end: Callable[[], None]) -> None:
    server.should_exit = True
    before_end()
