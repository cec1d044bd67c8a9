"""The role of an engine, and what it still has to do of the one before.

A role is what the service wants of an engine. The engine can do all of it at any time, so that a change needs no
restart: new work comes by the new role at once, and what was begun ends as it began. Each change has an epoch, and
requests that were sent by an earlier one are refused: their sender looks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pdctl.engine.front.core_client import CoreClient
from pdctl.net.openai.api import ApiError
from pdctl.wire import ROLE_CHANGED, RoleCall


class RoleDesk:
    """The current role. `prefills`: requests whose KV is for a peer; `answers`: other requests."""

    def __init__(self, core: CoreClient) -> None:
        # The supervisor tells it once the engine is ready; until then it takes everything.
        self.role = "hybrid"
        self.epoch = 0
        self.prefills = self.answers = 0
        self._core = core

    def take(self, call: RoleCall) -> RoleCall:
        """Take a role. Prompts for peers that have not been begun go back to their router if prefill ends here."""
        if call.epoch >= self.epoch:
            if call.role == "decode" and self.role != "decode":
                self._core.hand_back()
            self.role, self.epoch = call.role, call.epoch
        return RoleCall(self.role, self.epoch)

    def check(self, given: str) -> None:
        """Raises ApiError for a request by an earlier epoch. Without one, anybody may send anything."""
        if given.isdecimal() and int(given) < self.epoch:
            raise ApiError(409, f"this engine is {self.role} by now", ROLE_CHANGED)

    @contextmanager
    def counted(self, hold: bool) -> Iterator[None]:
        """Count a request."""
        by = (1, 0) if hold else (0, 1)
        self.prefills, self.answers = self.prefills + by[0], self.answers + by[1]
        try:
            yield
        finally:
            self.prefills, self.answers = self.prefills - by[0], self.answers - by[1]
