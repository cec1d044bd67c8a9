"""A whole service: its units in order, its sockets, its plan as it changes, its end."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from pdctl.errors import PdctlError
from pdctl.host.boot import host_id
from pdctl.plan import Plan, ProcessSpec
from pdctl.plan.changes import Changes, diff
from pdctl.supervisor.process import logs
from pdctl.supervisor.process.listeners import Listeners
from pdctl.supervisor.process.spawn import raise_limits
from pdctl.supervisor.process.tree import SweptTree, Trees, become_subreaper, kill_tree, reap_strangers, stamps
from pdctl.supervisor.rundir.adoption import PLAN, SECRET, STATE, AdoptableState, Records, read_adoptable
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.rundir.rundir import SPACE_HINT, RunDir
from pdctl.supervisor.service.apply import ApplyFailed, Progress, apply
from pdctl.supervisor.service.attached import AttachedWatch
from pdctl.supervisor.service.fleet import Fleet
from pdctl.supervisor.service.kv import KvWatch, shown_links
from pdctl.supervisor.service.measurements import MeasurementReader
from pdctl.supervisor.service.proxies import Proxies
from pdctl.supervisor.surface.control import serve_control
from pdctl.supervisor.surface.notify import Notifier
from pdctl.supervisor.unit.exits import KernelLog
from pdctl.supervisor.unit.lifecycle import Phase
from pdctl.supervisor.unit.policy import policy_of
from pdctl.supervisor.unit.unit import ProcessPolicy, Unit, UnitContext
from pdctl.supervisor.unit.verbs import drained, event_of, objection
from pdctl.wire import SECRET_ENV, UNIT_ENV, LeaseReply

_HOUSEKEEPING_S = 1.0
_LOGS_S = 5.0
_CLEAR_S = 10.0
# What a later supervisor needs is written at most this often, seconds.
_SAVE_S = 0.05
_LONGEST_SOCKET_PATH = 107  # sun_path in linux/un.h, without the final zero


class _Down(Exception):
    """Ends the task group when everything has stopped."""


class Service:
    """Runs a plan until told to stop. `say(process, message)` is told of every event."""

    def __init__(self, plan: Plan, say: Callable[[str, str], None]) -> None:
        self.plan = plan
        self.failure: str | None = None
        self._wanted = plan
        self._rundir = RunDir(Path(plan.run_dir))
        self._journal = Journal(Path(plan.log_dir), say)
        self._notifier = Notifier()
        self._kernel = KernelLog()
        self._stamp = f"{UNIT_ENV}={plan.run_dir}"
        self._stopping = False
        self._was_ready = False
        self._announced = False
        self._dirty = asyncio.Event()
        self._unsaved = asyncio.Event()
        self._linking = 0
        self._attached = AttachedWatch()
        self._measurements = MeasurementReader()
        self._applying: asyncio.Task[None] | None = None
        self._progress: Progress | None = None
        self._told: frozenset[str] = frozenset()
        self._listeners = Listeners(Path(plan.run_dir))
        self._fleet = Fleet(self._stamp, self._listeners)
        self._adoptable: AdoptableState | None = None
        # Filled by _begin, before anything runs.
        self._around: UnitContext
        self._proxies: Proxies
        self._kv: KvWatch
        self._policy: ProcessPolicy

    # -- from outside --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start everything, keep it running, and return when it is down. Raises PdctlError before it starts."""
        self._rundir.acquire()
        trees = Trees(self._stamp)
        try:
            self._adoptable = read_adoptable(self._rundir.path)
            await self._clear_leftovers(self._adoptable)
            if self._adoptable is None:
                self._rundir.clear()
            await self._supervise(trees)
        except* _Down:
            self._adoptable = None
            await self._clear_leftovers(None)
        finally:
            self._listeners.close()
            self._kernel.close()
            trees.close()
            # Should we end by a fault, whoever survives us can still be taken over.
            self._rundir.release(keep=self._adoptable is not None or any(unit.alive for unit in self._fleet))

    def stop(self) -> None:
        """Stop the proxy, then the engines. A second call kills what is left."""
        if self._stopping:
            self._fleet.force()
        self._stopping = True
        self._notifier.say("STOPPING=1")
        if self._applying is not None:
            self._applying.cancel()
        self._dirty.set()

    def status(self) -> dict[str, object]:
        """As `pdctl status --json` shows it, without what is measured."""
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
            "source": self.plan.source,
            "trees": self._around.trees.method,
            "apply": asdict(self._progress) if self._progress else None,
            "processes": [unit.status() for unit in self._fleet],
            "attached": [self._attached.status(attached) for attached in self.plan.attached],
            "links": shown_links(self._kv.links),
        }

    async def fresh_status(self) -> dict[str, object]:
        """The same, with figures: engines are asked now."""
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(self._kv.states())
            for attached in self.plan.attached:
                tasks.create_task(self._attached.ask(attached))
        states = asked.result()
        found = self.status()
        measurements = self._measurements.of(list(self._fleet), states)
        found["processes"] = [{**unit.status(), **measurements[unit.name]} for unit in self._fleet]
        return found

    def exits(self) -> list[dict[str, object]]:
        """Reports of the last exits, for `pdctl why`: its file may lack them."""
        return self._journal.exits()

    async def leases(self) -> dict[str, object]:
        """As `pdctl kv --json` shows them."""
        return await self._kv.leases()

    async def revoke(self, lease_id: str) -> LeaseReply:
        """Take a lease back."""
        return await self._kv.revoke(lease_id)

    def ask(self, name: str, verb: str, drain: bool) -> str:
        """One of VERBS for one process; the reason why not, or ""."""
        unit = self._fleet.get(name)
        if unit is None:
            return f"no process {name!r}; there are: {', '.join(unit.name for unit in self._fleet)}"
        if self._stopping:
            return "the service is going down"
        if self._applying is not None and verb != "stop":
            # It waits for the processes it stops, and somebody who starts them again would keep it waiting.
            return f"an apply is under way: {self._progress.step if self._progress else ''}"
        if reason := objection(unit, verb):
            return reason
        self._journal.say(name, f"asked to {verb}{', drained first' if drain else ''}", "asked", verb=verb)
        unit.feed(event_of(verb, drain))
        return ""

    def changes(self, wanted: Plan) -> Changes:
        """What `apply` would do."""
        return diff(self.plan, wanted)

    def apply(self, wanted: Plan) -> str:
        """Begin to change over; the reason why not, or ""."""
        if self._stopping:
            return "the service is going down"
        if self._applying is not None:
            return f"another apply is under way: {self._progress.step if self._progress else ''}"
        if wanted.run_dir != self.plan.run_dir:
            return f"that topology is of service {wanted.service!r}, not of {self.plan.service!r}"
        self._applying = self._around.tasks.create_task(self._apply(wanted))
        return ""

    def state(self) -> str:
        """starting, ready, degraded (was ready, something is not now), failed or stopping."""
        phases = self._fleet.phases
        if self._stopping:
            return "stopping"
        if Phase.FAILED in phases:
            return "failed"
        if all(phase is Phase.READY for phase in phases) and not (self._linking and not self._was_ready):
            return "ready"
        return "degraded" if self._was_ready else "starting"

    # -- what applying needs (Managed) ---------------------------------------------------------------------

    def unit(self, name: str) -> Unit | None:
        """The process of that name."""
        return self._fleet.get(name)

    def add(self, spec: ProcessSpec) -> Unit:
        """Have another process; it starts with the next step."""
        unit = self._fleet.add(spec, self._around)
        self._dirty.set()
        return unit

    def open_sockets(self, specs: list[ProcessSpec]) -> None:
        """Those that the specs listen on; raises PdctlError before anything is touched."""
        for spec in specs:
            if spec.listen is not None:
                self._listeners.of(spec.listen)

    def remove(self, unit: Unit) -> None:
        """Forget a process that has ended."""
        self._fleet.remove(unit)
        self._kv.forget(unit.name)
        self._dirty.set()

    async def take_on(self, plan: Plan) -> str:
        """Make `plan` the one that runs, without touching processes; why a proxy does not follow it, or ""."""
        self.plan = plan
        self._fleet.follow(plan)
        policy_of(plan, self._policy)
        self._keep(PLAN, plan.to_dict())
        return await self._proxies.tell(plan)

    # -- the loop ------------------------------------------------------------------------------------------

    async def _supervise(self, trees: Trees) -> None:
        loop = asyncio.get_running_loop()
        become_subreaper()
        raise_limits()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self.stop)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._begin(tasks, trees)
                tasks.create_task(serve_control(self._rundir.control_socket, self))
                tasks.create_task(self._housekeeping())
                tasks.create_task(self._save_forever())
                while True:
                    self._step()
                    if self._stopping and self._fleet.is_over:
                        raise _Down
                    await self._dirty.wait()
                    self._dirty.clear()
        finally:
            if hasattr(self, "_kv"):
                self._kv.close()

    def _step(self) -> None:
        """Start what may start; when stopping, stop what may stop."""
        if self.state() == "ready" and not self._announced:
            self._was_ready = self._announced = True
            message = f"service {self.plan.service!r} is ready at {self.plan.proxy_url}"
            self._journal.say("pdctl", message, "service_ready")
            self._notifier.say("READY=1", f"STATUS=ready at {self.plan.proxy_url}")
        self._check_start()
        if self._stopping:
            self._fleet.stop_what_may()
        else:
            self._fleet.start_what_may(self._was_ready)

    def _check_start(self) -> None:
        """A service that never became ready is taken down whole: nothing half-started is left behind."""
        if self._was_ready or self._stopping:
            return
        failed = self._fleet.failed()
        reason = self._kv.refused()
        if reason or failed:
            self.failure = reason or f"{failed.name if failed else ''} {failed.life.reason if failed else ''}"
            self._stopping = True

    def _changed(self, unit: Unit) -> None:
        self._dirty.set()
        self._unsaved.set()
        drained = self._fleet.drained()
        if drained != self._told and not self._stopping:
            self._told = drained
            self._proxies.draining = set(drained)
            unit.around.tasks.create_task(self._tell())

    async def _tell(self) -> None:
        if reason := await self._proxies.tell(self.plan):
            self._journal.say("pdctl", f"not every proxy was told: {reason}")

    def _unit_ready(self, unit: Unit) -> None:
        """Link a new engine to its peers; the service counts as ready when that is decided."""
        if unit.spec.kind == "proxy":
            # Its file may have changed since it read it.
            unit.around.tasks.create_task(self._tell())
        else:
            self._linking += 1
            unit.around.tasks.create_task(self._link(unit))

    async def _link(self, unit: Unit) -> None:
        await self._kv.link(unit.name)
        self._linking -= 1
        self._dirty.set()

    def _unit_died(self, unit: Unit) -> asyncio.Task[None]:
        """Witness: what it held is freed now, whatever becomes of its replacement."""
        if unit.life.phase is not Phase.STOPPING:
            for other in self._fleet.restart_companions(unit):
                self._journal.say(other.name, f"restarted with {unit.name}", "restarted_with")
        return unit.around.tasks.create_task(self._kv.reclaim(unit.name, f"{unit.name}@{unit.epoch}"))

    async def _drain(self, unit: Unit) -> None:
        """Return when nothing runs in an engine any more, or its time is over. A proxy drains by itself, at TERM."""
        if unit.spec.kind == "proxy":
            return
        await self._proxies.tell(self.plan)
        drain_s = self.plan.supervision.drain_s
        if await drained(unit.name, drain_s, self._proxies.calls_at, self._kv.state_of):
            return
        self._journal.say(unit.name, f"still busy after {drain_s:g} s: its requests go on elsewhere", "drain_over")

    async def _apply(self, wanted: Plan) -> None:
        progress = self._progress = Progress("running")

        def say(step: str) -> None:
            progress.step = step
            self._journal.say("pdctl", step, "apply")

        try:
            await apply(self, wanted, say)
            progress.state, progress.step = "done", ""
        except (ApplyFailed, PdctlError) as failure:
            progress.state, progress.error = "failed", str(failure)
            self._journal.say("pdctl", f"apply ended half-way: {failure}", "apply_failed")
        finally:
            # However far it got: the plan is what there is.
            self.plan = replace(self.plan, processes=self._fleet.specs())
            self._keep(PLAN, self.plan.to_dict())
            self._applying = None
            self._dirty.set()

    async def _housekeeping(self) -> None:
        log_due = watchdog_due = 0.0
        while True:
            await asyncio.sleep(min(_HOUSEKEEPING_S, self._notifier.watchdog_s or _HOUSEKEEPING_S))
            now = time.monotonic()
            reap_strangers(self._fleet.pids())
            self._put_files_back()
            if self._notifier.watchdog_s and now >= watchdog_due:
                watchdog_due = now + self._notifier.watchdog_s
                self._notifier.say("WATCHDOG=1")
            if now >= log_due:
                log_due = now + _LOGS_S
                logs.cap_all([unit.log_path for unit in self._fleet], self._policy.log_bytes, self._journal.say)

    def _put_files_back(self) -> None:
        """The run directory, when a logout or a cleaner of temporary files removed it while the service runs."""
        try:
            if not self._rundir.restore():
                return
            self._write_files()
        except (OSError, PdctlError) as failure:
            self._journal.say("pdctl", f"the run directory was removed and cannot be put back: {failure}")
            return
        self._unsaved.set()
        self._journal.say("pdctl", f"{self._rundir.path} had been removed; it was put back", "run_dir_restored")

    async def _save_forever(self) -> None:
        """What a later supervisor needs, after every change, but not at every change."""
        while True:
            await self._unsaved.wait()
            await asyncio.sleep(_SAVE_S)
            self._unsaved.clear()
            self._keep(STATE, msgspec.to_builtins(Records(host_id(), self._fleet.records())))

    def _keep(self, name: str, value: object) -> None:
        """For later starts; a full disk must not end the service."""
        try:
            self._rundir.write_json(name, value)
        except OSError as failure:
            self._journal.say("pdctl", f"{name} cannot be written: {failure}")

    # -- getting ready -------------------------------------------------------------------------------------

    def _begin(self, tasks: asyncio.TaskGroup, trees: Trees) -> None:
        """Sockets and files that children expect, and the children, new or adopted."""
        adoptable = self._adoptable
        if adoptable is not None:
            self.plan = adoptable.plan
        secret = adoptable.secret if adoptable else secrets.token_hex(16)
        self._policy = policy_of(self.plan)
        self._proxies = Proxies(self._rundir, secret, self._fleet.serving)
        self._kv = KvWatch(secret, self._fleet.members, self._fleet.holders, self._journal.say)
        self._around = UnitContext(
            policy=self._policy,
            log_dir=Path(self.plan.log_dir),
            run_dir=self._rundir.path,
            env={SECRET_ENV: secret},
            secret=secret,
            trees=trees,
            tasks=tasks,
            journal=self._journal,
            kernel=self._kernel,
            changed=self._changed,
            ready=self._unit_ready,
            died=self._unit_died,
            drain=self._drain,
            our_pids=self._fleet.pids,
        )
        self._prepare({record.spec.name for record in adoptable.processes} if adoptable else set())
        for spec in self.plan.processes:
            self.add(spec)
        if adoptable is not None:
            self._adopt(adoptable)

    def _adopt(self, adoptable: AdoptableState) -> None:
        """Take over what runs as it was planned then, and change over to what is wanted now."""
        for record in adoptable.processes:
            if (unit := self._fleet.get(record.spec.name)) is not None:
                unit.adopt(record)
        self._was_ready = True
        if not diff(self.plan, self._wanted).is_empty:
            self.apply(self._wanted)

    def _write_files(self) -> None:
        """What children and a later supervisor read. Raises OSError."""
        (self._rundir.path / "ipc").mkdir(exist_ok=True)
        self._rundir.write_json(PLAN, self.plan.to_dict())
        self._rundir.write_private(SECRET, self._around.secret)
        self._proxies.write(self.plan)

    def _prepare(self, adopted: set[str]) -> None:
        for spec in self.plan.processes:
            longest = f"{self._rundir.path}/ipc/{spec.name}.listen"
            if len(longest) > _LONGEST_SOCKET_PATH:
                hint = "set PDCTL_RUN to a shorter directory, or shorten the names"
                raise PdctlError(f"{longest} is too long for a unix socket", hint)
            if spec.listen is not None and spec.listen not in self._listeners:
                self._listeners.open(spec.listen, [s.name for s in self.plan.processes if s.name in adopted])
        try:
            self._write_files()
        except OSError as failure:
            raise PdctlError(f"{self._rundir.path} cannot be written: {failure.strerror}", SPACE_HINT) from failure

    async def _clear_leftovers(self, adoptable: AdoptableState | None) -> None:
        """End what a supervisor that was killed left, before anything is started in its place, and what we left.

        Of what is taken over, everything that nobody wrote down: it was started in the last moment.
        """
        known = {f"{self._stamp}:{record.spec.name}" for record in adoptable.processes} if adoptable else set()
        stray = [stamp for stamp in stamps(f"{self._stamp}:") if stamp not in known]
        for stamp in stray:
            tree = SweptTree(stamp)
            self._journal.say("pdctl", f"ending pids {tree.pids()} of an earlier start")
            if left := await kill_tree(tree, set(), _CLEAR_S):
                hint = "they are stuck in the kernel (state D); wait, or reboot"
                raise PdctlError(f"pids {left} of an earlier start do not die", hint)
