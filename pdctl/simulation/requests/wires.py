"""What lies between the parts of an imagined service: calls, and reads of KV."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pdctl.engine.virtual import VirtualTime
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.fleet import Fleet
from pdctl.proxy.request.failover import FailoverPolicy
from pdctl.simulation.spec import TransferSpec

if TYPE_CHECKING:
    from pdctl.simulation.engines.node import Node
    from pdctl.simulation.requests.attempts import Place


class Wires:
    """`fleet`: what the router knows of the engines; `call_s`: what a call takes; `down`: told of an engine that a call
    did not reach."""

    def __init__(
        self,
        time: VirtualTime,
        fleet: Fleet,
        transfer: TransferSpec,
        failover: FailoverPolicy,
        call_s: float,
        down: Callable[[Node], None],
    ) -> None:
        self.time, self.fleet, self.transfer, self._failover = time, fleet, transfer, failover
        self.moved = 0
        self._call_s, self._down = call_s, down
        # When the reads into each engine end: they take turns.
        self._free_at: dict[str, float] = {}

    def call(self, place: Place, arrives: Callable[[], None], fails: Callable[[], None]) -> None:
        """Call an engine. If it is up by then, the call arrives."""
        place.engine.breaker.started(self.time())

        def arrive() -> None:
            if place.node.is_up:
                arrives()
            else:
                self._down(place.node)
                fails()

        self.after_call(arrive)

    def patience(self, engine: Engine, over: Callable[[], None]) -> None:
        """Call `over` when a prompt that the engine gets now takes too long."""
        self.time.after(self._failover.patience_s(self.fleet.expected_s(engine)), over)

    def after_call(self, then: Callable[[], None]) -> None:
        """Go on when a call has been made."""
        self.time.after(self._call_s, then)

    def read(self, node: Node, tokens: int, then: Callable[[], None]) -> None:
        """Read the KV of so many tokens into an engine."""
        amount = tokens * self.transfer.token_bytes
        self.moved += amount
        begin = max(self.time(), self._free_at.get(node.name, 0.0))
        end = begin + self.transfer.latency_s + amount / self.transfer.bandwidth
        self._free_at[node.name] = end
        self.time.at(end, then)
