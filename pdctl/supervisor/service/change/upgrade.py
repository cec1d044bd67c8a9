"""Hands the service to another version of pdctl: the supervisor becomes that version's, and then applies its plan.

Engines and proxies are restarted by that apply, as their command or version differs: engines after a drain, one by one,
proxies with the connections that they have, if `takeover` is on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pdctl.control_api import UpgradeOrder
from pdctl.errors import PdctlError
from pdctl.supervisor.process.keeper import Keepers
from pdctl.supervisor.process.listeners import Listeners
from pdctl.supervisor.process.succession import Succession, become, refusal, tried
from pdctl.supervisor.rundir.journal import Journal

# The caller gets its answer first, seconds.
_ANSWER_S = 0.2


class Upgrade:
    """`save` writes the files that the next supervisor reads; raises OSError, PdctlError. `objection`: why it is not
    possible now, or ""."""

    def __init__(
        self,
        listeners: Listeners,
        keepers: Keepers,
        journal: Journal,
        save: Callable[[], None],
        objection: Callable[[], str],
    ) -> None:
        self._listeners = listeners
        self._keepers = keepers
        self._journal = journal
        self._save = save
        self._objection = objection
        self.is_under_way = False

    async def begin(self, order: UpgradeOrder) -> str:
        """Returns the reason if it is refused, else "". The other version is tried first: if it failed afterwards, the
        service would have no supervisor."""
        if self.is_under_way:
            return "an upgrade is in progress"
        if reason := self._objection() or refusal(order.program):
            return reason
        self.is_under_way = True
        reason = "its caller has gone"
        try:
            reason = await self._tried(order)
        finally:
            self.is_under_way = not reason
        if not reason:
            asyncio.get_running_loop().call_later(_ANSWER_S, self._succeed, order)
        return reason

    async def _tried(self, order: UpgradeOrder) -> str:
        try:
            self._save()
        except OSError as failure:
            return f"the state cannot be written: {failure.strerror}"
        told = await tried(order.program, self._given(order))
        return f"the supervisor of that version does not start: {told}" if told else self._objection()

    def _given(self, order: UpgradeOrder) -> Succession:
        return Succession(order.plan, self._listeners.kept(), self._keepers.kept())

    def _succeed(self, order: UpgradeOrder) -> None:
        """A stop may have come meanwhile, or a crash: nothing of that is lost by not becoming another now."""
        try:
            if reason := self._objection():
                raise PdctlError(reason)
            self._save()
            self._journal.say("pdctl", f"goes on as {order.program[0]}", "upgrade", program=order.program[0])
            become(order.program, self._given(order))
        except (OSError, PdctlError) as failure:
            self._journal.say("pdctl", f"the upgrade failed: {failure}", "upgrade_failed")
        self.is_under_way = False
