"""The whole run of a service: lock the run directory, end leftover processes, run, release."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

from pdctl.net.keeping import TakenOver
from pdctl.plan import Plan
from pdctl.supervisor.process.keeper import Keepers
from pdctl.supervisor.process.leftovers import clear_leftovers
from pdctl.supervisor.process.listeners import Listeners
from pdctl.supervisor.process.spawn import raise_limits
from pdctl.supervisor.process.succession import STOP_SIGNALS, Succession
from pdctl.supervisor.process.tree import Trees, become_subreaper
from pdctl.supervisor.rundir.adoption import AdoptableState, read_adoptable
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.service.fleet import Fleet
from pdctl.supervisor.service.others import ClusterSide
from pdctl.supervisor.service.running import Resources, RunningService
from pdctl.supervisor.service.state import ServiceState
from pdctl.supervisor.surface.control import serve_control
from pdctl.supervisor.surface.controlled import OneMachine
from pdctl.supervisor.surface.notify import Notifier
from pdctl.supervisor.unit.exits import KernelLog
from pdctl.wire import UNIT_ENV


class _Down(Exception):
    """Ends the task group when everything has stopped."""


class Service:
    """Runs a plan until it is stopped. `say(process, message)` is called for every event. `cluster`: the other nodes.

    `failure`: after `run`, why the service did not start, or None.
    """

    def __init__(
        self,
        plan: Plan,
        say: Callable[[str, str], None],
        cluster: ClusterSide | None = None,
        succession: Succession | None = None,
    ) -> None:
        """`succession`: of the supervisor that this process was before."""
        self.failure: str | None = None
        self._cluster = cluster
        self._plan = plan
        self._succession = succession
        self._rundir = RunDir(Path(plan.run_dir))
        self._journal = Journal(Path(plan.log_dir), say)
        self._stamp = f"{UNIT_ENV}={plan.run_dir}"

    async def run(self) -> None:
        """Start everything, supervise it, and return when it is down. Raises PdctlError if it cannot start."""
        self._rundir.acquire()
        listeners = Listeners(self._rundir.path)
        keepers = Keepers(self._took_over)
        fleet = Fleet(self._stamp, listeners, keepers)
        kernel, trees = KernelLog(), Trees(self._stamp)
        resources = Resources(self._rundir, self._journal, Notifier(), kernel, trees, listeners, keepers, fleet)
        keep = False
        if self._succession is not None:
            listeners.restore(self._succession.sockets)
            keepers.restore(self._succession.keepers)
        try:
            adoptable = read_adoptable(self._rundir.path, self._succession is not None)
            keep = adoptable is not None
            await clear_leftovers(self._stamp, adoptable, self._journal)
            if adoptable is None:
                self._rundir.clear()
            await self._supervise(resources, adoptable)
        except* _Down:
            keep = False
            await clear_leftovers(self._stamp, None, self._journal)
        finally:
            listeners.close()
            keepers.close()
            kernel.close()
            trees.close()
            # If the supervisor ends because of an error, surviving processes can still be taken over.
            self._rundir.release(keep=keep or any(unit.alive for unit in fleet))

    def _took_over(self, name: str, told: TakenOver) -> None:
        went_on = (
            f"{told.connections} connections, {told.resumed} answers in the middle, {told.repeated} from the start"
        )
        cut = f"; {told.cut} were cut: {'; '.join(told.reasons)}" if told.cut else ""
        self._journal.say(name, f"goes on with {went_on}{cut}", "took_over", **msgspec.structs.asdict(told))

    async def _supervise(self, resources: Resources, adoptable: AdoptableState | None) -> None:
        """Raises _Down when everything has stopped."""
        become_subreaper()
        raise_limits()
        state = ServiceState.of(adoptable.plan if adoptable else self._plan, self._plan)
        # Before the parts exist: a signal that comes while they are made must not kill the supervisor.
        _on_signal(state.stop)
        async with asyncio.TaskGroup() as tasks:
            running = RunningService(resources, state, adoptable, tasks, self._cluster)
            _on_signal(running.stop)
            try:
                self._answer(running, tasks)
                if self._cluster is not None:
                    # A node may have nothing to run for days: the agent is ready as soon as it answers.
                    resources.notifier.say("READY=1", "STATUS=follows its cluster")
                tasks.create_task(running.keep_house_forever())
                tasks.create_task(running.save_forever())
                tasks.create_task(running.keep_links_forever())
                tasks.create_task(running.keep_nodes_forever())
                tasks.create_task(running.follow_load_forever())
                tasks.create_task(running.show_forever())
                await running.run()
                if self._cluster is not None:
                    await self._cluster.leave()
            finally:
                self.failure = state.failure
                running.close()
            raise _Down

    def _answer(self, running: RunningService, tasks: asyncio.TaskGroup) -> None:
        """Answer the control API, and be a part of the cluster if there is one."""
        if self._cluster is None:
            tasks.create_task(serve_control(self._rundir.control_socket, OneMachine(running)))
            return
        control = self._cluster.control(running)
        tasks.create_task(serve_control(self._rundir.control_socket, control))
        tasks.create_task(running.others.run_forever())
        tasks.create_task(self._cluster.run_forever(running))


def _on_signal(stop: Callable[[], None]) -> None:
    for sign in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(sign, stop)
    # After a succession they are blocked until here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
