"""A whole service: its units in order, its control socket, its end."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import cast

import msgspec

from pdctl.errors import PdctlError
from pdctl.host.ports import listening_ports
from pdctl.lean_http import Pool, Unreachable
from pdctl.plan import Attached, Plan, ProcessSpec
from pdctl.serving import listen_tcp
from pdctl.supervisor.control import serve_control
from pdctl.supervisor.kv import KvWatch, Member
from pdctl.supervisor.lifecycle import Event, Kind, Phase, Policy
from pdctl.supervisor.rundir import RunDir
from pdctl.supervisor.tree import become_subreaper, kill_tree, reap_strangers, stamped
from pdctl.supervisor.unit import Surroundings, Unit
from pdctl.wire import SECRET_ENV, UNIT_ENV, EngineAddress, LeaseReply, LinkInfo, ProxyConfig

_HOUSEKEEPING_S = 1.0
_CLEAR_S = 10.0
# An attached engine that has not answered by then is shown as silent.
_ASK_S = 1.0
_LONGEST_SOCKET_PATH = 107  # sun_path in linux/un.h, without the final zero


class _Down(Exception):
    """Ends the task group when everything has stopped."""


class Service:
    """Runs a plan until told to stop. `say(process, message)` is told of every event."""

    def __init__(self, plan: Plan, say: Callable[[str, str], None]) -> None:
        self.plan = plan
        self.failure: str | None = None
        self._say = say
        self._rundir = RunDir(Path(plan.run_dir))
        self._secret = secrets.token_hex(16)
        self._units: list[Unit] = []
        self._stopping = False
        self._was_ready = False
        self._dirty = asyncio.Event()
        self._listeners: list[socket.socket] = []
        self._linking = 0
        self._answers: dict[str, bool] = {}
        self._kv = KvWatch(self._secret, self._members, self._holders, say)

    # -- from outside --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start everything, keep it running, and return when it is down. Raises PdctlError before it starts."""
        self._rundir.acquire()
        try:
            await self._clear_leftovers()
            self._prepare()
            become_subreaper()
            await self._supervise()
        except* _Down:
            pass
        finally:
            for listener in self._listeners:
                listener.close()
            self._kv.close()
            self._rundir.release()

    def stop(self) -> None:
        """Stop the proxy, then the engines. A second call kills what is left."""
        if self._stopping:
            for unit in self._units:
                unit.force()
        self._stopping = True
        self._dirty.set()

    def status(self) -> dict[str, object]:
        """As `pdctl status --json` shows it."""
        return {
            "service": self.plan.service,
            "state": self.state(),
            "failure": self.failure,
            "proxy_url": self.plan.proxy_url,
            "model": self.plan.model,
            "served_model_name": self.plan.served_model_name,
            "tls_cert": self.plan.proxy.tls_cert,
            "supervisor_pid": os.getpid(),
            "run_dir": self.plan.run_dir,
            "log_dir": self.plan.log_dir,
            "processes": [unit.status() for unit in self._units],
            "attached": [
                {**asdict(attached), "answers": self._answers.get(attached.name)} for attached in self.plan.attached
            ],
            "links": [{"reader": reader, **_shown(link)} for (reader, _), link in sorted(self._kv.links.items())],
        }

    async def fresh_status(self) -> dict[str, object]:
        """The same, links and their speed asked of the engines now."""
        await asyncio.gather(self._kv.states(), *(self._ask(attached) for attached in self.plan.attached))
        return self.status()

    async def _ask(self, attached: Attached) -> None:
        pool = Pool(attached.host, attached.port, connect_s=_ASK_S)
        try:
            self._answers[attached.name] = (await pool.request("GET", "/health", timeout_s=_ASK_S)).status == 200
        except Unreachable:
            self._answers[attached.name] = False
        finally:
            pool.close()

    async def leases(self) -> dict[str, object]:
        """As `pdctl kv --json` shows them."""
        return await self._kv.leases()

    async def revoke(self, lease_id: str) -> LeaseReply:
        """Take a lease back."""
        return await self._kv.revoke(lease_id)

    def state(self) -> str:
        """starting, ready, degraded (was ready, something is not now), failed or stopping."""
        phases = [unit.life.phase for unit in self._units]
        if self._stopping:
            return "stopping"
        if Phase.FAILED in phases:
            return "failed"
        if all(phase is Phase.READY for phase in phases) and not (self._linking and not self._was_ready):
            return "ready"
        return "degraded" if self._was_ready else "starting"

    # -- the loop ------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self.stop)
        async with asyncio.TaskGroup() as tasks:
            self._make_units(tasks)
            tasks.create_task(serve_control(self._rundir.control_socket, self))
            tasks.create_task(self._housekeeping())
            while True:
                self._step()
                if self._stopping and all(unit.life.phase in _ENDED for unit in self._units):
                    raise _Down
                await self._dirty.wait()
                self._dirty.clear()

    def _step(self) -> None:
        """Start what may start; when stopping, stop what may stop."""
        phases = {unit.spec.name: unit.life.phase for unit in self._units}
        if self.state() == "ready" and not self._was_ready:
            self._was_ready = True
            self._say("pdctl", f"service {self.plan.service!r} is ready at {self.plan.proxy_url}")
        if (reason := self._kv.refused()) and not self._was_ready and not self._stopping:
            self.failure, self._stopping = reason, True
        failed = next((unit for unit in self._units if unit.life.phase is Phase.FAILED), None)
        if failed and not self._was_ready and not self._stopping:
            # A service that never became ready is taken down whole: nothing half-started is left behind.
            self.failure = f"{failed.spec.name} {failed.life.reason}"
            self._stopping = True
        for unit in self._units:
            if self._stopping and unit.life.phase in (Phase.PENDING, Phase.BACKOFF):
                # Nothing runs: whoever depends on it need not be waited for, and it must not start again.
                self._stop_unit(unit)
            elif self._stopping:
                dependants = [u for u in self._units if unit.spec.name in u.spec.depends_on]
                if all(u.life.phase in _ENDED for u in dependants):
                    self._stop_unit(unit)
            elif unit.life.phase is Phase.PENDING and all(phases[n] is Phase.READY for n in unit.spec.depends_on):
                unit.feed(Event(Kind.START, time.monotonic()))

    def _stop_unit(self, unit: Unit) -> None:
        if unit.life.phase not in (*_ENDED, Phase.STOPPING):
            unit.feed(Event(Kind.STOP, time.monotonic()))

    def _changed(self, unit: Unit) -> None:
        self._dirty.set()
        try:
            self._rundir.write_json("state.json", self.status())
        except OSError as failure:
            # For people and later starts; a full disk must not end the service.
            self._say("pdctl", f"state.json cannot be written: {failure}")

    def _unit_ready(self, unit: Unit) -> None:
        """Link a new engine to its peers; the service counts as ready when that is decided."""
        if unit.spec.kind != "proxy":
            self._linking += 1
            unit.around.tasks.create_task(self._link(unit))

    async def _link(self, unit: Unit) -> None:
        await self._kv.link(unit.spec.name)
        self._linking -= 1
        self._dirty.set()

    def _unit_died(self, unit: Unit) -> asyncio.Task[None]:
        """Witness: what it held is freed now, whatever becomes of its replacement."""
        return unit.around.tasks.create_task(self._kv.reclaim(unit.spec.name, f"{unit.spec.name}@{unit.epoch}"))

    def _members(self) -> list[Member]:
        return [
            Member(unit.spec.name, unit.spec.role, unit.spec.ports["http"], unit.epoch)
            for unit in self._units
            if unit.spec.kind != "proxy" and unit.life.phase is Phase.READY and unit.alive
        ]

    def _holders(self) -> set[str]:
        return {f"{unit.spec.name}@{unit.epoch}" for unit in self._units if unit.alive}

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            reap_strangers(self._pids())

    def _pids(self) -> set[int]:
        return {unit.pid for unit in self._units if unit.pid is not None}

    # -- getting ready -------------------------------------------------------------------------------------

    def _make_units(self, tasks: asyncio.TaskGroup) -> None:
        around = Surroundings(
            policy=Policy(self.plan.max_restarts, self.plan.within_s),
            grace_s=self.plan.grace_s,
            log_dir=Path(self.plan.log_dir),
            env={SECRET_ENV: self._secret},
            stamp_prefix=self._stamp_prefix(),
            tasks=tasks,
            changed=self._changed,
            ready=self._unit_ready,
            died=self._unit_died,
            our_pids=self._pids,
            say=self._say,
        )
        by_address = {listener.getsockname()[1]: listener for listener in self._listeners}
        for spec in self.plan.processes:
            unit = Unit(spec, around)
            if spec.listen is not None:
                unit.listen_fd = by_address[spec.listen[1]].fileno()
            self._units.append(unit)

    def _stamp_prefix(self) -> str:
        """The service's place on this machine: two services of one name in different run directories do not meet."""
        return self.plan.run_dir

    async def _clear_leftovers(self) -> None:
        """What a supervisor that was killed left behind is ended before anything is started in its place."""
        stamp = f"{UNIT_ENV}={self._stamp_prefix()}:"
        if found := stamped(stamp):
            self._say("pdctl", f"ending pids {found} of an earlier start")
            if left := await kill_tree(stamp, set(), _CLEAR_S):
                hint = "they are stuck in the kernel (state D); wait, or reboot"
                raise PdctlError(f"pids {left} of an earlier start do not die", hint)

    def _prepare(self) -> None:
        """Sockets and files that children expect."""
        bound: set[tuple[str, int]] = set()
        for spec in self.plan.processes:
            longest = f"{self._rundir.path}/ipc/{spec.name}.out"
            if len(longest) > _LONGEST_SOCKET_PATH:
                hint = "set PDCTL_RUN to a shorter directory, or shorten the names"
                raise PdctlError(f"{longest} is too long for a unix socket", hint)
            if spec.listen is not None and spec.listen not in bound:
                bound.add(spec.listen)
                self._listeners.append(_listen(spec))
        (self._rundir.path / "ipc").mkdir()
        engines = [
            EngineAddress(spec.name, spec.role, spec.kind, "127.0.0.1", spec.ports["http"])
            for spec in self.plan.processes
            if spec.kind != "proxy"
        ]
        engines += [EngineAddress(*astuple(attached)) for attached in self.plan.attached]
        proxy = self.plan.proxy
        config = ProxyConfig(
            service=self.plan.service,
            model=self.plan.served_model_name,
            routing=proxy.routing,
            ttft_ms=self.plan.ttft_ms,
            tpot_ms=self.plan.tpot_ms,
            max_model_len=self.plan.max_model_len,
            engines=engines,
            workers=proxy.workers,
            run_dir=self.plan.run_dir,
            admission=proxy.admission,
            max_queue=proxy.max_queue,
            max_body_mb=proxy.max_body_mb,
            api_keys=proxy.api_keys,
            tls_cert=proxy.tls_cert,
            tls_key=proxy.tls_key,
            cors_origins=list(proxy.cors_origins),
            access_log=proxy.access_log,
            otlp_endpoint=proxy.otlp_endpoint,
        )
        self._rundir.write_json("proxy.json", msgspec.to_builtins(config))


_ENDED = (Phase.STOPPED, Phase.FAILED)


def _shown(link: LinkInfo) -> dict[str, object]:
    return cast(dict[str, object], msgspec.to_builtins(link))


def _listen(spec: ProcessSpec) -> socket.socket:
    """Bound by us and handed down, so that a restart of the process refuses nobody."""
    assert spec.listen is not None
    host, port = spec.listen
    try:
        return listen_tcp(host, port)
    except OSError as failure:
        holder = listening_ports().get(port)
        who = f" by {holder.describe()}" if holder else ""
        hint = "stop that process or choose another port under [proxy]"
        if failure.errno == errno.EADDRNOTAVAIL:
            hint = "proxy.host must be an address of this machine, or 0.0.0.0 for all of them"
        raise PdctlError(f"port {port} on {host} cannot be bound: {failure.strerror}{who}", hint) from failure
