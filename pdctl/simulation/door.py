"""Carries out the decisions of the proxy's admission, in virtual time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pdctl.engine.virtual import VirtualTime
from pdctl.proxy.engines.fleet import Fleet
from pdctl.proxy.request.admission import Admission, Refusal, Waiter

if TYPE_CHECKING:
    from pdctl.simulation.journey import Journey


class Door:
    """Requests wait here for their seats."""

    def __init__(self, admission: Admission, fleet: Fleet, time: VirtualTime) -> None:
        self.admission = admission
        self._fleet, self._time = fleet, time
        self._waiting: dict[Waiter, Journey] = {}

    def ask(self, journey: Journey) -> None:
        """Ask for a seat: now, later or not at all."""
        now, key = self._time(), journey.arrival.key
        outlook = self._fleet.outlook(journey.size, journey.arrival.outputs)
        asked = self.admission.ask(key, 0, outlook, now, journey.size)
        if isinstance(asked, Refusal):
            journey.refused(asked.reason)
        elif asked.granted:
            journey.seated()
        else:
            self._waiting[asked] = journey
            self._time.after(self.admission.patience_s, partial(self._give_up, asked))

    def leave(self, key: str, tpot_s: float | None) -> None:
        """A request with a seat has ended. `tpot_s`: None if it was not answered."""
        self.admission.done(self._time(), tpot_s, key)
        self.look()

    def look(self) -> None:
        """Grant seats that are free."""
        if not self.admission.has_waiters:
            return
        outlook = self._fleet.outlook(0.0, None)
        while (waiter := self.admission.next(outlook, self._time())) is not None:
            self._waiting.pop(waiter).seated()
            outlook = self._fleet.outlook(0.0, None)

    def _give_up(self, waiter: Waiter) -> None:
        if not waiter.granted:
            self.admission.leave(waiter)
            self._waiting.pop(waiter).refused("patience")
