"""`python -m pdctl.proxy --config FILE [--worker N]`: serve on the socket that the supervisor passed."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvicorn
import uvloop
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from pdctl.errors import PdctlError, first_of
from pdctl.net import LOOPBACK
from pdctl.net.identity import own_identity
from pdctl.net.identity.peers import NodesOnly
from pdctl.net.keeping import LEAVE_SIGNAL
from pdctl.net.serving import LOG_FORMAT, Server, listen_tcp, wants_certificates
from pdctl.net.tracing import Spans
from pdctl.proxy.client.connections import BoundedProtocol, reap_forever
from pdctl.proxy.client.keys import Keys
from pdctl.proxy.client.unknown_fields import UnknownFields
from pdctl.proxy.engines.load import SharedLoads
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.engines.releases import Releases
from pdctl.proxy.engines.routing import POLICIES
from pdctl.proxy.request.door import AdmissionDoor
from pdctl.proxy.request.generate import Completions
from pdctl.proxy.request.leg import Shared
from pdctl.proxy.request.migration import Migration
from pdctl.proxy.request.quarantine import Quarantine
from pdctl.proxy.shares.accounts import Accounts
from pdctl.proxy.shares.rules import KeyRules
from pdctl.proxy.shares.shared_bodies import SharedBodies
from pdctl.proxy.shares.shared_totals import SharedTotals
from pdctl.proxy.surface.app import ProxyApp
from pdctl.proxy.surface.elsewhere import ElsewhereSurface
from pdctl.proxy.surface.figures import FiguresSurface
from pdctl.proxy.surface.internal import Internal
from pdctl.proxy.surface.reload import Reloader, admission_of
from pdctl.proxy.surface.return_listener import giving_back
from pdctl.proxy.takeover.cover import CoverCounts
from pdctl.proxy.takeover.covers import covers_of_environment
from pdctl.proxy.takeover.server import CoveringServer
from pdctl.proxy.takeover.uncovered import UncoveredProtocol
from pdctl.proxy.telemetry.access_log import AccessLog
from pdctl.proxy.telemetry.metrics import SAVE_S, Metrics
from pdctl.proxy.telemetry.spans import Tracing
from pdctl.proxy_wire import ProxyConfig, listener_path
from pdctl.wire import EPOCH_ENV, EXIT_CONFIG, LISTEN_FD_ENV, SECRET_ENV

if TYPE_CHECKING:
    from pdctl.net.identity.contexts import Identity

# Running answers may finish for at least this long after SIGTERM, seconds.
_LEAST_DRAIN_S = 1
# Number of engines for which workers can share load data.
_SLOTS = 1024

_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """Ends the task group after the server has shut down."""


def main() -> int:
    """Run the proxy. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pdctl.proxy")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0, help="port on which the supervisor reaches this worker")
    parser.add_argument("--control-host", default=LOOPBACK, help="address of that port")
    arguments = parser.parse_args()
    config = msgspec.json.decode(arguments.config.read_bytes(), type=ProxyConfig)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    _log.info("serving %s over %d engines", config.model, len(config.engines))
    listener = socket.socket(fileno=int(os.environ[LISTEN_FD_ENV]))
    code = 0
    try:
        uvloop.run(_run(config, arguments, listener))
    except* _Stopped:
        pass
    except* PdctlError as failures:
        failure = first_of(failures)
        assert isinstance(failure, PdctlError)
        sys.stderr.write(f"error: {failure}\n" + (f"hint: {failure.hint}\n" if failure.hint else ""))
        code = EXIT_CONFIG
    return code


async def _run(config: ProxyConfig, arguments: argparse.Namespace, listener: socket.socket) -> None:
    control_port: int = arguments.control_port
    loop = asyncio.get_running_loop()
    node = own_identity()
    async with asyncio.TaskGroup() as tasks:
        completions = _completions(config, arguments.worker, node)
        shared = completions.shared
        app = _app(config, completions, arguments.config)
        covers = covers_of_environment()
        settings = _uvicorn(config, app)
        server = Server(settings) if covers is None else CoveringServer(settings, covers)
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, _stop, server)
        if isinstance(server, CoveringServer):
            shared.metrics.covers = server.covers.counts
            leave = partial(_leave, server, completions, config.drain_s)
            loop.add_signal_handler(LEAVE_SIGNAL, lambda: tasks.create_task(leave()))
        elif config.takeover:
            shared.metrics.covers = CoverCounts()
            settings.http = partial(UncoveredProtocol, shared.metrics.covers)  # type: ignore[assignment]  # as good as a class
        tasks.create_task(shared.pool.watch_forever())
        tasks.create_task(shared.releases.run_forever())
        tasks.create_task(shared.unfinished.run_forever())
        tasks.create_task(Migration(shared.pool, shared.releases).run_forever())
        tasks.create_task(completions.door.run_forever())
        tasks.create_task(completions.log.run_forever())
        tasks.create_task(_keep_house(completions))
        tasks.create_task(reap_forever(server.server_state.connections))
        if control_port:
            tasks.create_task(_serve_control(app, arguments.control_host, control_port, node))
        _calm_collector()
        # uvicorn closes its socket on shutdown, but a new supervisor may still ask for this one.
        with giving_back(listener_path(Path(config.run_dir), _name(config, arguments.worker)), listener, loop):
            await server.serve(sockets=[listener.dup()])
        await shared.unfinished.settled(config.drain_s)
        shared.pool.close()
        shared.metrics.save()
        completions.log.flush()
        completions.tracing.close()
        raise _Stopped


def _completions(config: ProxyConfig, worker: int, node: Identity | None) -> Completions:
    """Build the request handler. Raises PdctlError for unusable files in the configuration."""
    several = config.workers > 1
    run_dir = Path(config.run_dir)
    loads = SharedLoads(run_dir / "loads", config.workers, _SLOTS, worker) if several else None
    bodies = SharedBodies(run_dir / "quarantine", config.workers, worker) if several else None
    if several:
        (run_dir / "metrics").mkdir(exist_ok=True)
    epoch = os.environ.get(EPOCH_ENV, "")
    by_slo = config.admission == "slo"
    secret, tls = os.environ.get(SECRET_ENV, ""), node.client_context if node is not None else None
    pool = EnginePool.of(config.engines, secret, loads, by_slo, tls)
    pool.follow(config.engines, config.draining, by_slo, config.unlinked, config.moving)
    pool.wants_prefixes = config.routing == "prefix_aware"
    ttft_s, tpot_s = config.ttft_ms / 1000, config.tpot_ms / 1000
    name = _name(config, worker)
    metrics = Metrics(config.model, ttft_s, tpot_s, run_dir / "metrics" if several else None, f"{name}.{epoch}")
    endpoint = config.otlp_endpoint
    spans = Spans(endpoint, f"pdctl/{config.service}", "pdctl.proxy") if endpoint else None
    shared = Shared(
        pool=pool,
        policy=POLICIES[config.routing],
        metrics=metrics,
        releases=Releases(),
        quarantine=Quarantine(secret, bodies),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        lease_s=config.lease_s,
    )
    return Completions(
        shared=shared,
        door=AdmissionDoor(admission_of(config), pool.outlook, metrics),
        keys=Keys(config.api_keys),
        accounts=Accounts(
            KeyRules(config.keys), SharedTotals(run_dir / "key-totals", config.workers, worker) if several else None
        ),
        log=AccessLog(config.access_log),
        model=config.model,
        holder=f"{name}@{epoch}",
        max_body=int(config.max_body_mb * 2**20),
        unknown=UnknownFields(config.unknown_fields == "refuse"),
        tracing=Tracing(spans),
    )


def _name(config: ProxyConfig, worker: int) -> str:
    """The worker's name in the plan."""
    return f"proxy-{worker}" if config.workers > 1 else "proxy"


def _app(config: ProxyConfig, completions: Completions, path: Path) -> ASGIApp:
    internal = Internal(os.environ.get(SECRET_ENV, ""))
    reloader = Reloader(path, config, completions, internal)
    epoch = os.environ.get(EPOCH_ENV, "")
    routes = [*reloader.routes(), *FiguresSurface(completions, internal).routes()]
    routes += ElsewhereSurface(completions, internal, epoch).routes()
    if config.accept_nodes:
        # Imported here: other services need neither the control API's client nor its memory.
        from pdctl.proxy.surface.nodes import NodeSurface

        routes += NodeSurface(lambda: reloader.config).routes()
    app: ASGIApp = ProxyApp.of(config, completions, routes)
    if config.cors_origins:
        app = CORSMiddleware(app, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _uvicorn(config: ProxyConfig, app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        loop="none",
        http=BoundedProtocol,
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(_LEAST_DRAIN_S, round(config.drain_s)),
        server_header=False,
        proxy_headers=False,
        ssl_certfile=config.tls_cert or None,
        ssl_keyfile=config.tls_key or None,
    )


def _calm_collector() -> None:
    """Freeze existing objects and collect garbage less often: requests create few cycles, and with Python's defaults
    collections take a tenth of the proxy's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


async def _serve_control(app: ASGIApp, host: str, port: int, node: Identity | None) -> None:
    """Serve the same application on a port of this worker's own: without TLS, or for nodes with certificates."""
    listener = listen_tcp(host, port)
    if node is not None:
        app = NodesOnly(app, node.who.service)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", loop="none", http=BoundedProtocol, ws="none",
        proxy_headers=False, ssl_context_factory=wants_certificates(node),
    )  # fmt: skip
    await Server(config).serve(sockets=[listener])


async def _keep_house(completions: Completions) -> None:
    while True:
        await asyncio.sleep(SAVE_S)
        completions.shared.metrics.save()
        completions.keys.reload()


async def _leave(server: CoveringServer, completions: Completions, drain_s: float) -> None:
    """End, and leave all connections to the next proxy."""
    await server.leave(drain_s)
    completions.shared.metrics.save()
    completions.log.flush()
    completions.tracing.close()
    # Nothing may end the connections on the way out.
    os._exit(0)


def _stop(server: uvicorn.Server) -> None:
    server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
