"""The files of a service: those that its processes read, and those that a later supervisor needs for a takeover."""

from __future__ import annotations

import asyncio

import msgspec

from pdctl.errors import PdctlError
from pdctl.host.boot import host_id
from pdctl.supervisor.rundir.adoption import PLAN, SECRET, STATE, Records
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.rundir.rundir import SPACE_HINT, RunDir
from pdctl.supervisor.service.fleet import Fleet
from pdctl.supervisor.service.proxies import Proxies
from pdctl.supervisor.service.state import ServiceState

# Minimum time between two writes of the state for a later supervisor, seconds.
_SAVE_S = 0.05


class ServiceFiles:
    """Writes the files, keeps them up to date, and restores them if they were removed."""

    def __init__(
        self, rundir: RunDir, secret: str, state: ServiceState, fleet: Fleet, proxies: Proxies, journal: Journal
    ) -> None:
        self._rundir = rundir
        self._secret = secret
        self._state = state
        self._fleet = fleet
        self._proxies = proxies
        self._journal = journal

    def write(self) -> None:
        """Write everything that must exist before a process starts. Raises PdctlError."""
        try:
            self._write()
        except OSError as failure:
            raise PdctlError(f"{self._rundir.path} cannot be written: {failure.strerror}", SPACE_HINT) from failure

    def keep_plan(self) -> None:
        """Write the changed plan."""
        self._keep(PLAN, self._state.plan.to_dict())

    def put_back(self) -> None:
        """Restore the run directory if a logout or a cleaner of temporary files removed it."""
        try:
            if not self._rundir.restore():
                return
            self._write()
        except (OSError, PdctlError) as failure:
            self._journal.say("pdctl", f"the run directory was removed and cannot be restored: {failure}")
            return
        self._state.unsaved.set()
        self._journal.say("pdctl", f"{self._rundir.path} had been removed; it was restored", "run_dir_restored")

    def save_now(self) -> None:
        """Write everything for a later supervisor. Raises OSError, PdctlError."""
        self._write()
        self._rundir.write_json(STATE, self._records())

    def _records(self) -> object:
        return msgspec.to_builtins(Records(host_id(), self._fleet.records()))

    async def save_forever(self) -> None:
        """Write the state for a later supervisor after changes. Changes in quick succession are written together."""
        while True:
            await self._state.unsaved.wait()
            await asyncio.sleep(_SAVE_S)
            self._state.unsaved.clear()
            self._keep(STATE, self._records())

    def _write(self) -> None:
        """Raises OSError."""
        (self._rundir.path / "ipc").mkdir(exist_ok=True)
        self._rundir.write_json(PLAN, self._state.plan.to_dict())
        self._rundir.write_private(SECRET, self._secret)
        self._proxies.write(self._state.plan)

    def _keep(self, name: str, value: object) -> None:
        """Write one file. Errors are only logged: a full disk must not end the service."""
        try:
            self._rundir.write_json(name, value)
        except OSError as failure:
            self._journal.say("pdctl", f"{name} cannot be written: {failure}")
