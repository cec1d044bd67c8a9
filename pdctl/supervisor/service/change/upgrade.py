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
from pdctl.supervisor.process.succession import Succession, become, refusal
from pdctl.supervisor.rundir.journal import Journal

# The caller gets its answer first, seconds.
_ANSWER_S = 0.2


class Upgrade:
    """`save` writes the files that the next supervisor reads; raises OSError, PdctlError."""

    def __init__(self, listeners: Listeners, keepers: Keepers, journal: Journal, save: Callable[[], None]) -> None:
        self._listeners = listeners
        self._keepers = keepers
        self._journal = journal
        self._save = save
        self.is_under_way = False

    def begin(self, order: UpgradeOrder) -> str:
        """Returns the reason if it is refused, else ""."""
        if self.is_under_way:
            return "an upgrade is in progress"
        if reason := refusal(order.program):
            return reason
        self.is_under_way = True
        asyncio.get_running_loop().call_later(_ANSWER_S, self._succeed, order)
        return ""

    def _succeed(self, order: UpgradeOrder) -> None:
        self._journal.say("pdctl", f"goes on as {order.program[0]}", "upgrade", program=order.program[0])
        try:
            self._save()
            become(order.program, Succession(order.plan, self._listeners.kept(), self._keepers.kept()))
        except (OSError, PdctlError) as failure:
            self._journal.say("pdctl", f"the upgrade failed: {failure}", "upgrade_failed")
        self.is_under_way = False
