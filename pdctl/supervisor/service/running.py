"""A running service: its parts, each created once, and the operations of the control API (see surface/control.py)."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from pdctl.control_api import (
    DashboardOrder,
    DashboardReply,
    ExitReport,
    KeysStatus,
    KvStatus,
    MeasuredStatus,
    Node,
    Nodes,
    RoleOrder,
    ServiceStatus,
    UpgradeOrder,
    Verb,
)
from pdctl.errors import PdctlError
from pdctl.net.identity import ContextFactory
from pdctl.plan import Attached, Plan
from pdctl.plan.changes import Changes, diff, with_roles
from pdctl.proxy_wire import RecentRequest
from pdctl.supervisor.cluster.entries import EngineEntry
from pdctl.supervisor.dashboard.dashboard import Dashboard
from pdctl.supervisor.dashboard.rates import Look
from pdctl.supervisor.process import logs
from pdctl.supervisor.process.keeper import Keepers
from pdctl.supervisor.process.listeners import Listeners
from pdctl.supervisor.process.tree import Trees, reap_strangers
from pdctl.supervisor.rundir.adoption import AdoptableState
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.service.change.apply import Progress
from pdctl.supervisor.service.change.change_over import ChangeOver
from pdctl.supervisor.service.change.elastic import ElasticRoles
from pdctl.supervisor.service.change.roles import Roles
from pdctl.supervisor.service.change.upgrade import Upgrade
from pdctl.supervisor.service.files import ServiceFiles
from pdctl.supervisor.service.fleet import Fleet
from pdctl.supervisor.service.kv import KvWatch, Member
from pdctl.supervisor.service.links.attached import AttachedEngines
from pdctl.supervisor.service.links.keeper import LinkKeeper
from pdctl.supervisor.service.links.nodes import RegisteredEngines
from pdctl.supervisor.service.links.sweeps import Sweeper
from pdctl.supervisor.service.measurements import keys_status
from pdctl.supervisor.service.others import ClusterSide, Others, OthersKeeper
from pdctl.supervisor.service.proxies import Proxies
from pdctl.supervisor.service.reconcile import Reconciler
from pdctl.supervisor.service.state import ServiceState
from pdctl.supervisor.service.status import StatusReader
from pdctl.supervisor.surface.notify import Notifier
from pdctl.supervisor.unit.exits import KernelLog
from pdctl.supervisor.unit.lifecycle import Phase
from pdctl.supervisor.unit.unit import Unit, UnitContext
from pdctl.supervisor.unit.verbs import event_of, objection
from pdctl.wire import SECRET_ENV, LeaseReply

_HOUSEKEEPING_S = 1.0
_LOGS_S = 5.0
_UPGRADING = "an upgrade is in progress"
# Phases of a process that was asked to go, or that stays away.
_HELD = frozenset({Phase.DRAINING, Phase.DRAINED, Phase.STOPPING, Phase.STOPPED})
_LONGEST_SOCKET_PATH = 107  # sun_path in linux/un.h, without the final zero


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources that exist before and after the service runs: files, sockets, process trees."""

    rundir: RunDir
    journal: Journal
    notifier: Notifier
    kernel: KernelLog
    trees: Trees
    listeners: Listeners
    keepers: Keepers
    fleet: Fleet


class RunningService:
    """A service with its plan and the processes to take over. Raises PdctlError if a resource cannot be opened."""

    def __init__(
        self,
        resources: Resources,
        state: ServiceState,
        adoptable: AdoptableState | None,
        tasks: asyncio.TaskGroup,
        cluster: ClusterSide | None = None,
    ) -> None:
        new_secret = cluster.secret if cluster else secrets.token_hex(16)
        secret = adoptable.secret if adoptable else new_secret
        tls = cluster.tls if cluster else None
        self._cluster, self._others = cluster, Others(cluster.used, tls is not None) if cluster else Others()
        fleet, self.journal = resources.fleet, resources.journal
        self._state = state
        self._fleet = fleet
        self._notifier = resources.notifier
        self._attached = AttachedEngines(self._not_started, self.journal.say)
        self._kv = KvWatch(
            secret, fleet.members, self._holders, self.journal.say, self._attached.members, self._others.members, tls
        )
        self.proxies = proxies = Proxies(resources.rundir, secret, fleet.serving, tls)
        self._links = self._link_keeper(resources)
        self._nodes = self._registered(resources)
        if adoptable is not None:
            self._links.load()
            self._nodes.load()
        proxies.registered = self._nodes.attached
        proxies.unlinked = self._links.unlinked
        proxies.remote, proxies.remote_draining = self._others.addresses, self._others.draining
        if cluster is not None:
            proxies.calls_elsewhere = cluster.calls_elsewhere
        self.others = OthersKeeper(self._others, self._kv, self._tell)
        self._sweeper = Sweeper(self._kv, proxies, self._members, lambda: state.plan, self.journal.say)
        self._files = ServiceFiles(resources.rundir, secret, state, fleet, proxies, self.journal)
        self._reconciler = Reconciler(
            state, fleet, self._kv, self._links, proxies, self.journal, resources.notifier, tasks
        )
        context = self._context(resources, tasks, secret, tls)
        self._roles = Roles(state, fleet, self._kv, proxies, self._files, self.journal, tasks)
        self._elastic = ElasticRoles(state, fleet, self._kv, self._roles, self.journal)
        self._change_over = ChangeOver(
            state, fleet, self._kv, proxies, self._files, resources.listeners, context, self._roles
        )
        self._upgrade = Upgrade(
            resources.listeners, resources.keepers, self.journal, self._files.save_now, self._upgrade_objection
        )
        self._dashboard = Dashboard(self, secret)
        self._status = StatusReader(
            state, fleet, self._kv, self._change_over, self._nodes, resources.trees.method, cluster
        )
        self._open(resources, {record.spec.name for record in adoptable.processes} if adoptable else set())
        for spec in state.plan.processes:
            self._change_over.add(spec)
        if adoptable is not None:
            self._adopt(adoptable)

    async def run(self) -> None:
        """Run until everything is down."""
        await self._reconciler.run()

    async def keep_links_forever(self) -> None:
        """Keep engines linked, and free KV that nobody can name, for kinds that need it."""
        self._state.linking += 1
        await self._links.look()
        self._state.linking -= 1
        self._state.changed.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._links.keep_forever())
            tasks.create_task(self._sweeper.run_forever())
            tasks.create_task(self._kv.stay_connected_forever())

    async def keep_nodes_forever(self) -> None:
        """Watch the engines that registered themselves."""
        await self._nodes.keep_forever()

    async def follow_load_forever(self) -> None:
        """Let roles follow the load, if the topology wants that."""
        await self._elastic.run_forever()

    async def show_forever(self) -> None:
        """Serve the live page, while it is on."""
        self._dashboard.follow()
        await self._dashboard.run_forever()

    async def save_forever(self) -> None:
        """Keep the files for a later supervisor up to date."""
        await self._files.save_forever()

    async def keep_house_forever(self) -> None:
        """Reap orphans, limit the size of logs, restore files, notify systemd's watchdog."""
        log_due = watchdog_due = 0.0
        while True:
            await asyncio.sleep(min(_HOUSEKEEPING_S, self._notifier.watchdog_s or _HOUSEKEEPING_S))
            now = time.monotonic()
            reap_strangers(self._fleet.pids())
            self._files.put_back()
            self._dashboard.follow()
            if self._notifier.watchdog_s and now >= watchdog_due:
                watchdog_due = now + self._notifier.watchdog_s
                self._notifier.say("WATCHDOG=1")
            if now >= log_due:
                log_due = now + _LOGS_S
                logs.cap_all([unit.log_path for unit in self._fleet], self._state.policy.log_bytes, self.journal.say)

    # -- a part of a cluster (see ClusterSide) -------------------------------------------------------------

    def engines(self) -> list[EngineEntry]:
        """This node's engines and proxies that answer, as other nodes see them."""
        return self._fleet.entries(self.plan.node)

    async def epoch_of(self, entry: EngineEntry) -> str | None:
        """Ask an engine of another node for its epoch; None if it does not answer."""
        return await self._kv.epoch_of(self._others.member_of(entry))

    async def until_applied(self) -> None:
        """Return when no apply is under way. It ends by itself: each of its steps has a deadline."""
        await self._change_over.until_over()

    @property
    def applied(self) -> Progress | None:
        """The last apply, None before the first one."""
        return self._change_over.progress

    def close(self) -> None:
        """Close connections to engines."""
        self._kv.close()
        self._attached.close()

    # -- the control API (see Controlled) ------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The running plan."""
        return self._state.plan

    def status(self) -> ServiceStatus:
        """The status without measurements."""
        return self._status.status()

    async def fresh_status(self) -> MeasuredStatus:
        """The answer of `pdctl status --json`: the status with measurements."""
        return await self._status.measured()

    def exits(self) -> tuple[ExitReport, ...]:
        """Reports of the last exits, for `pdctl why`. They may be missing from the file."""
        return self.journal.exits()

    async def keys(self) -> KeysStatus:
        """The answer of `pdctl status --keys --json`."""
        return keys_status(self.plan.proxy.keys, await self.proxies.keys())

    async def leases(self) -> KvStatus:
        """The answer of `pdctl kv --json`."""
        return await self._kv.leases()

    async def revoke(self, lease_id: str) -> LeaseReply:
        """Revoke a lease."""
        return await self._kv.revoke(lease_id)

    async def nodes(self) -> Nodes:
        """The engines that registered themselves."""
        return await self._nodes.nodes()

    def add_node(self, node: Node) -> str:
        """Make an engine a member. Returns the reason if it is refused, else ""."""
        return "the service is stopping" if self._state.is_stopping else self._nodes.add(node)

    def remove_node(self, name: str) -> str:
        """Remove an engine that registered itself. Returns the reason if it is refused, else ""."""
        return self._nodes.remove(name)

    def ask(self, name: str, verb: Verb, drain: bool) -> str:
        """Execute a verb on one process. Returns the reason if it is refused, else ""."""
        unit = self._fleet.get(name)
        if unit is None:
            return f"no process {name!r}; known: {', '.join(unit.name for unit in self._fleet)}"
        if self._state.is_stopping:
            return "the service is stopping"
        if self._upgrade.is_under_way:
            return _UPGRADING
        if self._change_over.is_under_way and verb != "stop":
            # An apply waits for the processes that it stops. A start in between would keep it waiting.
            return f"an apply is in progress: {self._change_over.step}"
        if reason := objection(unit, verb):
            return reason
        self.journal.say(name, f"{verb} requested{', after a drain' if drain else ''}", "asked", verb=verb)
        unit.feed(event_of(verb, drain))
        return ""

    def change_role(self, name: str, call: RoleOrder) -> str:
        """Give an engine another role. Returns the reason if it is refused, else ""."""
        if self._state.is_stopping:
            return "the service is stopping"
        if self._upgrade.is_under_way:
            return _UPGRADING
        if self._change_over.is_under_way:
            return f"an apply is in progress: {self._change_over.step}"
        if reason := self._roles.objection(name, call.role):
            return reason
        if not call.dry_run:
            drain_s = self.plan.supervision.drain_s if call.drain_s is None else call.drain_s
            self.journal.say(name, f"the role {call.role} was asked for", "asked", verb="role", role=call.role)
            self._roles.change(name, call.role, drain_s)
        return ""

    def show(self, order: DashboardOrder) -> DashboardReply:
        """Open or close the live page."""
        return self._dashboard.order(order)

    async def look(self) -> Look:
        """What the live page samples: the state of every engine, its leases, and the proxies' figures."""
        states, figures, _ = await asyncio.gather(
            self._kv.states(), self.proxies.figures(), self._status.ask_attached()
        )
        return Look(states, self._kv.status_of(states), figures)

    async def recent(self) -> tuple[RecentRequest, ...]:
        """The last requests of all proxies, newest first."""
        return await self.proxies.recent()

    def changes(self, wanted: Plan) -> Changes:
        """The changes that `apply` would make."""
        return diff(self.plan, with_roles(self.plan, wanted))

    def apply(self, wanted: Plan) -> str:
        """Start to apply a plan. Returns the reason if it is refused, else ""."""
        return _UPGRADING if self._upgrade.is_under_way else self._change_over.begin(wanted)

    async def upgrade(self, order: UpgradeOrder) -> str:
        """Become another version's supervisor. Returns the reason if it is refused, else ""."""
        return await self._upgrade.begin(order)

    def _upgrade_objection(self) -> str:
        if self._cluster is not None:
            return "the agent of a cluster's node is upgraded by a restart"
        if self._state.is_stopping:
            return "the service is stopping"
        if self._change_over.is_under_way:
            return f"an apply is in progress: {self._change_over.step}"
        # The next supervisor starts every process of its plan, and knows of no drain.
        held = [f"{unit.name} is {unit.life.phase.value}" for unit in self._fleet if unit.life.phase in _HELD]
        return f"{', '.join(held)}: start it first, or wait until it has ended" if held else ""

    def stop(self) -> None:
        """Stop the proxy, then the engines. A second call kills the remaining processes."""
        if self._state.is_stopping:
            self._fleet.force()
        self._state.stop()
        self._notifier.say("STOPPING=1")
        self._change_over.cancel()

    # -- parts ---------------------------------------------------------------------------------------------

    def _unit_changed(self, unit: Unit) -> None:
        self._reconciler.unit_changed(unit)
        if self._cluster is not None and unit.spec.is_ours:
            self._cluster.engines_changed()

    def _holders(self) -> set[str]:
        """The names of everything alive that may hold leases."""
        return self._fleet.holders() | self._others.holders()

    def _members(self) -> list[Member]:
        """All engines that answer, also those that pdctl did not start."""
        return [*self._fleet.members(), *self._attached.members()]

    def _not_started(self) -> tuple[Attached, ...]:
        """The engines that pdctl uses but did not start."""
        return (*self._state.plan.attached, *self._nodes.attached())

    def _names(self) -> set[str]:
        """The names of all processes and engines."""
        return {spec.name for spec in self.plan.processes} | {attached.name for attached in self._not_started()}

    async def _tell(self) -> None:
        if (reason := await self.proxies.tell(self.plan)) and not self._state.is_stopping:
            self.journal.say("pdctl", f"not every proxy was updated: {reason}")

    def _tidy(self) -> None:
        """Forget what is known of engines that are gone."""
        names = self._names()
        self.proxies.keep_only(names)
        self._sweeper.keep_only(names)

    def _context(
        self, resources: Resources, tasks: asyncio.TaskGroup, secret: str, tls: ContextFactory | None
    ) -> UnitContext:
        plan = self._state.plan
        return UnitContext(
            policy=self._state.policy,
            log_dir=Path(plan.log_dir),
            run_dir=resources.rundir.path,
            env={SECRET_ENV: secret},
            secret=secret,
            trees=resources.trees,
            tasks=tasks,
            journal=self.journal,
            kernel=resources.kernel,
            changed=self._unit_changed,
            ready=self._reconciler.unit_ready,
            died=self._reconciler.unit_died,
            drain=self._reconciler.drain,
            our_pids=self._fleet.pids,
            node=plan.node,
            tls=tls,
        )

    def _link_keeper(self, resources: Resources) -> LinkKeeper:
        return LinkKeeper(self._kv, self._fleet.members, self._attached, self._names, self._tell, resources.rundir)

    def _registered(self, resources: Resources) -> RegisteredEngines:
        def answering() -> set[str]:
            return {member.name for member in self._attached.members()}

        return RegisteredEngines(
            plan=lambda: self._state.plan,
            proxies=self.proxies,
            state_of=self._kv.state_of,
            answering=answering,
            tell=self._tell,
            tidy=self._tidy,
            journal=self.journal,
            run_dir=resources.rundir,
        )

    def _open(self, resources: Resources, adopted: set[str]) -> None:
        """Open the sockets and write the files that processes need."""
        listeners, names = resources.listeners, [spec.name for spec in self.plan.processes]
        for spec in self.plan.processes:
            longest = f"{resources.rundir.path}/ipc/{spec.name}.listen"
            if len(longest) > _LONGEST_SOCKET_PATH:
                hint = "set PDCTL_RUN to a shorter path, or use shorter names"
                raise PdctlError(f"{longest} is too long for a unix socket", hint)
            if spec.listen is not None and spec.listen not in listeners:
                listeners.open(spec.listen, [name for name in names if name in adopted])
        if adopted:
            listeners.claim_only(self.plan.processes)
        else:
            listeners.claim(self.plan.processes)
        self._files.write()

    def _adopt(self, adoptable: AdoptableState) -> None:
        """Take over the running processes with their old plan, then apply the new plan."""
        for record in adoptable.processes:
            if (unit := self._fleet.get(record.spec.name)) is not None:
                unit.adopt(record)
        self._state.was_ready = True
        if not self.changes(self._state.wanted).is_empty:
            self.apply(self._state.wanted)
