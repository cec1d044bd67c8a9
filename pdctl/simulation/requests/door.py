"""Carries out the decisions of the proxy's admission, in virtual time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pdctl.engine.virtual import VirtualTime
from pdctl.proxy.engines.fleet import Fleet
from pdctl.proxy.request.admission import Admission, Refusal
from pdctl.proxy.shares.fair_queue import Waiter, Work

if TYPE_CHECKING:
    from pdctl.simulation.requests.journey import Journey


class Door:
    """Requests wait here for their seats."""

    def __init__(self, admission: Admission, fleet: Fleet, time: VirtualTime) -> None:
        self.admission = admission
        self._fleet, self._time = fleet, time
        self._waiting: dict[Waiter, Journey] = {}

    def ask(self, journey: Journey) -> None:
        """Ask for a seat: now, later or not at all."""
        arrival = journey.arrival
        outlook = self._fleet.outlook(journey.size, arrival.outputs)
        asked = self.admission.ask(arrival.key, 0, outlook, self._time(), arrival.outputs)
        if isinstance(asked, Refusal):
            journey.refused(asked.reason)
        elif asked.granted:
            journey.seated(asked)
        else:
            self._waiting[asked] = journey
            self._time.after(self.admission.patience_s, partial(self._give_up, asked))
            for waiter, refusal in self.admission.take_pushed_out():
                self._waiting.pop(waiter).refused(refusal.reason)

    def prefilled(self, seat: Waiter) -> None:
        """The prompt of a request is computed: engines may take another one."""
        self.admission.prefilled(seat)
        self.look()

    def leave(self, seat: Waiter, tpot_s: float | None, actual: Work) -> None:
        """A request with a seat has ended. `tpot_s`: None if it was not answered; `actual`: its work."""
        self.admission.done(seat, self._time(), tpot_s, actual)
        self.look()

    def look(self) -> None:
        """Grant seats that are free."""
        if not self.admission.has_waiters:
            return
        outlook = self._fleet.outlook(0.0, None)
        while (waiter := self.admission.next(outlook, self._time())) is not None:
            self._waiting.pop(waiter).seated(waiter)
            outlook = self._fleet.outlook(0.0, None)

    def _give_up(self, waiter: Waiter) -> None:
        if not waiter.granted and not waiter.pushed_out:
            self.admission.leave(waiter)
            self._waiting.pop(waiter).refused("patience")
