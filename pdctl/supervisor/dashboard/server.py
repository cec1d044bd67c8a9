"""The page's HTTP server, on a socket that is bound already."""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

import uvicorn

from pdctl.host.devices.gpu import read_gpus
from pdctl.net.prompt_protocol import PromptProtocol
from pdctl.net.serving import Server, close_connections
from pdctl.plan import Plan
from pdctl.supervisor.dashboard.access import Gate
from pdctl.supervisor.dashboard.app import DashboardApp, Shown
from pdctl.supervisor.dashboard.feed import Feed
from pdctl.supervisor.dashboard.findings import DoctorRuns
from pdctl.supervisor.dashboard.messages import GpuName
from pdctl.supervisor.dashboard.rates import Look
from pdctl.supervisor.dashboard.sampler import Sampler, Viewers, pulse_on_events
from pdctl.supervisor.rundir.journal import Journal

# Open pages have this long to read the last update, seconds.
_END_S = 0.5


class Watched(Shown, Protocol):
    """A service that can be looked at."""

    @property
    def plan(self) -> Plan: ...
    @property
    def journal(self) -> Journal: ...
    async def look(self) -> Look: ...


async def serve_page(service: Watched, gate: Gate, listener: socket.socket) -> None:
    """Take samples and answer until cancelled. Closes the socket."""
    viewers, feed = Viewers(), Feed(service.journal)
    sampler, doctor = Sampler(service.look, viewers), DoctorRuns(lambda: service.plan.source)
    gpus = tuple(GpuName(gpu.uuid, gpu.index, gpu.name, gpu.memory) for gpu in await asyncio.to_thread(read_gpus))
    app = DashboardApp(service, gate, viewers, sampler, feed, doctor, gpus, service.plan.node)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", loop="none", http=PromptProtocol, ws="none",
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=1, limit_concurrency=256,
    )  # fmt: skip
    server = Server(config)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sampler.run_forever())
            tasks.create_task(pulse_on_events(service.journal, viewers))
            tasks.create_task(doctor.run_forever())
            await server.serve(sockets=[listener])
    finally:
        server.stop_listening()
        listener.close()
        app.ended.set()
        viewers.pulse()
        await _until_nobody_watches(viewers)
        await close_connections(server)


async def _until_nobody_watches(viewers: Viewers) -> None:
    deadline = asyncio.get_running_loop().time() + _END_S
    while len(viewers) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - half a second at most
        await asyncio.sleep(0.02)
