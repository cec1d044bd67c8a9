"""`python -m pdctl.proxy --config FILE`: serve on the socket that the supervisor handed down."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec
import uvicorn
import uvloop

from pdctl.proxy.app import ProxyApp
from pdctl.proxy.metrics import Metrics
from pdctl.proxy.pool import EnginePool
from pdctl.proxy.relay import Shared, release_forever
from pdctl.proxy.routing import POLICIES
from pdctl.serving import LOG_FORMAT, Server
from pdctl.wire import EPOCH_ENV, LISTEN_FD_ENV, SECRET_ENV, ProxyConfig

# Running answers may end by themselves for this long after TERM, seconds.
_DRAIN_S = 5
_MAX_RELEASES = 1024


_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """Ends the task group when the server has shut down."""


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pdctl.proxy")
    parser.add_argument("--config", type=Path, required=True)
    config = msgspec.json.decode(parser.parse_args().config.read_bytes(), type=ProxyConfig)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    _log.info("serving %s over %d engines", config.model, len(config.engines))
    listener = socket.socket(fileno=int(os.environ[LISTEN_FD_ENV]))
    try:
        uvloop.run(_run(config, listener))
    except* _Stopped:
        pass
    return 0


async def _run(config: ProxyConfig, listener: socket.socket) -> None:
    shared = Shared(
        pool=EnginePool.of(config.engines),
        policy=POLICIES[config.routing],
        metrics=Metrics(config.ttft_ms / 1000, config.tpot_ms / 1000),
        secret=os.environ.get(SECRET_ENV, ""),
        holder=f"proxy@{os.environ.get(EPOCH_ENV, '')}",
        releases=asyncio.Queue(_MAX_RELEASES),
    )
    server = Server(
        uvicorn.Config(
            ProxyApp(config, shared),
            log_level="warning",
            access_log=False,
            lifespan="off",
            loop="none",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_DRAIN_S,
            http="httptools",
        )
    )
    for sign in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sign, _stop, server)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(shared.pool.watch_forever())
        tasks.create_task(release_forever(shared))
        await server.serve(sockets=[listener])
        shared.pool.close()
        raise _Stopped


def _stop(server: uvicorn.Server) -> None:
    server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
