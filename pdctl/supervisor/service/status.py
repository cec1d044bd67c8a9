"""Builds the answer of `pdctl status`."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict

import msgspec

from pdctl import __version__
from pdctl.adapters import dialect
from pdctl.control_api import AttachedStatus, MeasuredStatus, ServiceStatus
from pdctl.host.boot import new_epoch
from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.plan import Attached
from pdctl.supervisor.service.change.change_over import ChangeOver
from pdctl.supervisor.service.fleet import Fleet
from pdctl.supervisor.service.kv import KvWatch, shown_links
from pdctl.supervisor.service.links.nodes import RegisteredEngines
from pdctl.supervisor.service.measurements import MeasurementReader
from pdctl.supervisor.service.others import ClusterSide
from pdctl.supervisor.service.state import ServiceState
from pdctl.supervisor.unit.views import status_of

# An attached engine that does not answer within this time is shown as not answering, seconds.
_ASK_S = 1.0


class StatusReader:
    """Collects the status from the parts of the service. `trees`: how process trees are ended."""

    def __init__(
        self,
        state: ServiceState,
        fleet: Fleet,
        kv: KvWatch,
        change_over: ChangeOver,
        nodes: RegisteredEngines,
        trees: str,
        cluster: ClusterSide | None = None,
    ) -> None:
        self._state = state
        self._nodes = nodes
        self._fleet = fleet
        self._kv = kv
        self._change_over = change_over
        self._trees = trees
        self._cluster = cluster
        self._attached = AttachedWatch()
        self._measurements = MeasurementReader()
        self._epoch = new_epoch()

    def status(self) -> ServiceStatus:
        """The status without measurements."""
        state, plan, progress = self._state, self._state.plan, self._change_over.progress
        return ServiceStatus(
            service=plan.service,
            state=state.word(self._fleet.phases),
            failure=state.failure,
            proxy_url=plan.proxy_url,
            model=plan.model,
            served_model_name=plan.served_model_name,
            tls_cert=plan.proxy.tls_cert,
            supervisor_pid=os.getpid(),
            supervisor_epoch=self._epoch,
            version=__version__,
            run_dir=plan.run_dir,
            log_dir=plan.log_dir,
            source=plan.source,
            trees=self._trees,
            apply=progress.status() if progress else None,
            processes=tuple(status_of(unit) for unit in self._fleet),
            attached=(*map(self._attached.status, plan.attached), *map(self._registered, self._nodes.attached())),
            links=shown_links(self._kv.links),
            refused=(self._cluster.refused_order or "") if self._cluster is not None else "",
        )

    async def measured(self) -> MeasuredStatus:
        """The status with measurements. Calls every engine."""
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(self._kv.states())
            tasks.create_task(self.ask_attached())
        processes = self._measurements.of(list(self._fleet), asked.result())
        return MeasuredStatus(**(msgspec.structs.asdict(self.status()) | {"processes": processes}))

    async def ask_attached(self) -> None:
        """Check which engines that pdctl did not start answer; `status` has the results."""
        engines = (*self._state.plan.attached, *self._nodes.attached())
        self._attached.keep_only({attached.name for attached in engines})
        async with asyncio.TaskGroup() as tasks:
            for attached in engines:
                tasks.create_task(self._attached.ask(attached))

    def _registered(self, attached: Attached) -> AttachedStatus:
        """The status of an engine that registered itself."""
        leaving = self._nodes.is_leaving(attached.name)
        return msgspec.structs.replace(self._attached.status(attached), registered=True, leaving=leaving)


class AttachedWatch:
    """Health checks of the attached engines: keeps the last answer of each."""

    def __init__(self) -> None:
        self._answers: dict[str, bool] = {}

    def keep_only(self, names: set[str]) -> None:
        """Forget the answers of other engines than these."""
        self._answers = {name: answers for name, answers in self._answers.items() if name in names}

    async def ask(self, attached: Attached) -> None:
        """Check one engine now."""
        pool = ConnectionPool(attached.host, attached.port, connect_s=_ASK_S)
        try:
            # Without its key, an engine may answer 401: it answers. /health of some kinds takes longer than _ASK_S.
            path = dialect(attached.kind).probe_path
            self._answers[attached.name] = (await pool.request("GET", path, timeout_s=_ASK_S)).status < 500
        except Unreachable:
            self._answers[attached.name] = False
        finally:
            pool.close()

    def status(self, attached: Attached) -> AttachedStatus:
        """The status of one engine, with its last answer."""
        known = {name: value for name, value in asdict(attached).items() if name != "ports"}
        return AttachedStatus(**known, answers=self._answers.get(attached.name))
