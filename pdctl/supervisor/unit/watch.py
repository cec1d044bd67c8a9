"""Watches one incarnation of a process: the phases of its start, its readiness, then its liveness."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from pdctl.adapters import BaseLauncher, Launcher, NoControl, can_launch, control, kinds, launcher
from pdctl.net.identity import ContextFactory
from pdctl.plan import ProcessSpec
from pdctl.supervisor.process.probes import Cadence, Prober
from pdctl.supervisor.process.shared_memory import mapped
from pdctl.supervisor.process.startup import StartupLog
from pdctl.supervisor.process.tree import Tree
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.unit.lifecycle import Kind, LifecycleEvent

# Interval at which the log of a starting process is read, seconds.
_LOG_S = 0.5
# Interval at which the shared memory of a running process is noted, seconds.
_MEMORY_S = 10.0


class Watch:
    """`phase`: the phase of the start, "" if unknown or over; `since`: when it began, monotonic seconds.

    `shared_memory`: files of shared memory that the process tree has mapped so far.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        log: Path,
        secret: str,
        journal: Journal,
        tree: Tree,
        feed: Callable[[LifecycleEvent], None],
        tls: ContextFactory | None = None,
    ) -> None:
        self.phase = ""
        self.shared_memory: set[str] = set()
        self._tree = tree
        self.since = time.monotonic()
        self._spec = spec
        self._startup = StartupLog(log, launcher_of(spec).phases)
        self._journal = journal
        self._feed = feed
        read_progress = control(spec.kind).progress if spec.probe.state else NoControl().progress
        self._prober = Prober(spec.probe, log, secret if spec.is_ours else "", read_progress, tls)

    async def run(self, cadence: Callable[[], Cadence]) -> None:
        """Feed what the probes find: ready, too late, or not alive any more."""
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(self._follow())
            is_ready = await self._prober.until_ready()
            following.cancel()
        if not is_ready:
            self._feed(LifecycleEvent(Kind.STARTUP_TIMEOUT, time.monotonic(), detail=self.phase))
            return
        self.phase = ""
        self._feed(LifecycleEvent(Kind.PROBE_OK, time.monotonic()))
        async with asyncio.TaskGroup() as tasks:
            noting = tasks.create_task(self._note_memory())
            reason = await self._prober.until_dead(cadence)
            noting.cancel()
        self._journal.say(self._spec.name, reason, "not_alive")
        self._feed(LifecycleEvent(Kind.NOT_ALIVE, time.monotonic(), detail=reason))

    async def _follow(self) -> None:
        while True:
            phase = self._startup.next_phase()
            if phase and phase != self.phase:
                self.phase, self.since = phase, time.monotonic()
                self._journal.say(self._spec.name, phase, "phase")
            self._note()
            await asyncio.sleep(_LOG_S)

    async def _note_memory(self) -> None:
        while True:
            self._note()
            await asyncio.sleep(_MEMORY_S)

    def _note(self) -> None:
        if launcher_of(self._spec).leaves_shared_memory:
            self.shared_memory |= mapped(self._tree.pids())


def launcher_of(spec: ProcessSpec) -> Launcher | BaseLauncher:
    """The launcher of an engine's kind; one without any knowledge for other processes."""
    kind = spec.kind
    return launcher(kind) if spec.is_engine and kind in kinds() and can_launch(kind) else BaseLauncher()
