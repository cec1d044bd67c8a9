"""The state of a service as a whole: the desired state and the current state."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdctl import control_api
from pdctl.plan import Plan
from pdctl.supervisor.unit.lifecycle import Phase
from pdctl.supervisor.unit.policy import ProcessPolicy, policy_of


@dataclass(slots=True)
class ServiceState:
    """`plan`: the running plan; `wanted`: the plan given at the start, which is applied after a takeover.

    `failure`: why it is stopped before it was ever ready; `linking`: number of engines whose links are being made.
    `changed` is set when a step may be needed, `unsaved` when the state for a later supervisor must be written.
    """

    plan: Plan
    wanted: Plan
    policy: ProcessPolicy
    was_ready: bool = False
    is_announced: bool = False
    is_stopping: bool = False
    failure: str | None = None
    linking: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    unsaved: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, plan: Plan, wanted: Plan) -> ServiceState:
        """The state of a service at its start."""
        return cls(plan, wanted, policy_of(plan))

    def stop(self) -> None:
        """From now on the service is to be down."""
        self.is_stopping = True
        self.changed.set()

    def follow(self, plan: Plan) -> None:
        """Make `plan` the running plan."""
        self.plan = plan
        policy_of(plan, self.policy)

    def word(self, phases: Sequence[Phase]) -> control_api.ServiceState:
        """starting, ready, degraded (was ready, but a process is not now), failed or stopping."""
        if self.is_stopping:
            return "stopping"
        if Phase.FAILED in phases:
            return "failed"
        if all(phase is Phase.READY for phase in phases) and not (self.linking and not self.was_ready):
            return "ready"
        return "degraded" if self.was_ready else "starting"
