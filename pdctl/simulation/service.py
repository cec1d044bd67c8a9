"""A whole imagined service under a load."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from pdctl.adapters import Condition, dialect
from pdctl.bench import Record
from pdctl.elastic import Rules
from pdctl.engine.virtual import VirtualTime
from pdctl.net.http_client import ConnectionPool
from pdctl.proxy.engines.breaker import RetryBudget
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.fleet import Fleet
from pdctl.proxy.engines.routing import POLICIES
from pdctl.proxy.request.admission import Admission
from pdctl.proxy.request.failover import FailoverPolicy
from pdctl.proxy.shares.fair_queue import Waiter, Work
from pdctl.proxy_wire import EngineAddress
from pdctl.simulation.elastic import ElasticRoles
from pdctl.simulation.engines.machine import Machine
from pdctl.simulation.engines.models import Models
from pdctl.simulation.engines.node import Node
from pdctl.simulation.requests.attempts import Place
from pdctl.simulation.requests.door import Door
from pdctl.simulation.requests.journey import Journey
from pdctl.simulation.requests.wires import Wires
from pdctl.simulation.spec import Arrival, EngineSpec, ServiceSpec

# Nobody waits longer for anything (pdctl.proxy.request.failover), so without any token or end for so long the
# simulation itself is wrong, seconds.
_STANDSTILL_S = 1200.0
# Between two requests of a warm-up, and after it, seconds.
_WARM_UP_S = 60.0
# How often the proxy asks an engine for its condition, and looks for free seats and engines, seconds.
_PROBE_S, _LOOK_S = 0.5, 0.25


class Service:
    """`placed`: requests that a pair or a decode engine alone could compute, by the reason for the choice. `failures`:
    failed tries."""

    def __init__(self, spec: ServiceSpec, seed: int = 0) -> None:
        self.spec = spec
        self.time = VirtualTime()
        self.rng = random.Random(seed)  # noqa: S311 - load spreading and jitter, the same each time
        self.policy = POLICIES[spec.routing]
        self.failover, self.budget = FailoverPolicy(), RetryBudget()
        self.request_number = 0
        self.placed: Counter[str] = Counter()
        self.failures = 0
        self.progress_at = 0.0
        self._machines = {
            name: Machine(self.time, one.cores, one.slowdown) for name, one in spec.machines.items()
        }  # fmt: skip
        self._noise = random.Random(f"{seed}/noise")  # noqa: S311 - the same each time
        self._models = Models()
        self._waiting: list[Callable[[], None]] = []
        self._journeys: list[Journey] = []
        self._unfinished = 0
        self._shares_prefixes = False

    def run(self, load: Sequence[Arrival], warm_up: Sequence[Arrival] = ()) -> list[Record]:
        """Serve a load, and return what its clients measure, in its order. `warm_up`: requests that are served before,
        one after the other."""
        assert not self._journeys, "a service runs once"
        self._shares_prefixes = any(arrival.prompt for arrival in load)
        self._build()
        begin = _WARM_UP_S * len(warm_up)
        every = [replace(arrival, at=_WARM_UP_S * number) for number, arrival in enumerate(warm_up)]
        every += [replace(arrival, at=begin + arrival.at) for arrival in load]
        self._journeys = [Journey(self, number, arrival) for number, arrival in enumerate(every)]
        self._unfinished = len(every)
        for journey in self._journeys:
            self.time.at(journey.arrival.at, journey.arrive)
        for fault in self.spec.faults:
            self.time.at(begin + fault.at_s, partial(self._kill, self.places[fault.engine].node, fault.after_s))
        self._probe()
        self._look()
        if self.elastic is not None:
            self.time.at(begin, self.elastic.look)
        self.time.run()
        return [journey.record for journey in self._journeys[len(warm_up) :]]

    def wait(self, then: Callable[[], None]) -> None:
        """Go on when engines have changed, or soon."""
        self._waiting.append(then)

    def ended(self, journey: Journey, seat: Waiter | None) -> None:
        """A request has ended."""
        self.progress_at = self.time()
        self._unfinished -= 1
        if seat is not None:
            record = journey.record
            tpot_s = (record.ended_at - record.first_at) / max(1, record.output_tokens - 1) if record.is_good else None
            self.door.leave(seat, tpot_s, Work(float(record.input_tokens), float(record.output_tokens)))

    def audit(self) -> None:
        """Check that every request has ended, and that nothing is left of it anywhere."""
        assert all(journey.is_over for journey in self._journeys)
        assert self._unfinished == 0
        self.door.admission.audit()
        assert self.door.admission.running == 0
        for node, engine in self.places.values():
            node.audit()
            assert engine.prompts.active == engine.streams.active == 0, f"{node.name} has load"

    # -- parts ---------------------------------------------------------------------------------------------

    def _build(self) -> None:
        spec = self.spec
        self.places = {
            one.name: Place(self._node(one), _engine(number, one)) for number, one in enumerate(spec.engines)
        }
        assert len(self.places) == len(spec.engines), "two engines have one name"
        self.fleet = Fleet(
            [place.engine for place in self.places.values()], self.time, predicts=spec.admission == "slo"
        )
        self.wires = Wires(self.time, self.fleet, spec.transfer, self.failover, spec.costs.call_s, self._suspect)
        admission = Admission.of(spec.admission, spec.max_queue, spec.ttft_s, spec.tpot_s)
        self.door = Door(admission, self.fleet, self.time)
        self.elastic = self._elastic()

    def _elastic(self) -> ElasticRoles | None:
        spec, wanted = self.spec, self.spec.elastic
        if wanted is None:
            return None
        rules = Rules(spec.ttft_s, spec.tpot_s, wanted.min_prefill, wanted.min_decode, wanted.cooldown_s)
        return ElasticRoles(self.time, self.fleet, self.places, rules, wanted.interval_s, lambda: self._unfinished > 0)

    def _node(self, spec: EngineSpec) -> Node:
        processor = self._machines[spec.machine].run if spec.machine else None
        model = partial(self._models.of, spec.times)
        return Node(spec, self.time, model, processor, self._stretch, self._shares_prefixes)

    def _stretch(self) -> float:
        jitter = self.spec.costs.jitter
        return self._noise.lognormvariate(0.0, jitter) if jitter else 1.0

    def _probe(self) -> None:
        for place in self.places.values():
            self._observe(place)
        has_come = self._journeys[-1].arrival.at if self._journeys else 0.0
        assert self.time() < max(self.progress_at, has_come) + _STANDSTILL_S, "requests stand still"
        if self._unfinished:
            self.time.after(_PROBE_S, self._probe)

    def _observe(self, place: Place) -> None:
        """The answer to a probe. As the proxy's pool takes it."""
        engine = place.engine
        engine.condition = condition = place.node.condition()
        if condition.usable and not engine.healthy:
            engine.renewed()
            engine.healthy = True
            self._changed()
        elif not condition.usable:
            engine.healthy = False

    def _suspect(self, node: Node) -> None:
        """A call to this engine has failed, so it is probed."""
        self._observe(self.places[node.name])

    def _look(self) -> None:
        self.door.look()
        self._changed()
        if self._unfinished:
            self.time.after(_LOOK_S, self._look)

    def _changed(self) -> None:
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()

    def _kill(self, node: Node, after_s: float) -> None:
        if not node.is_up:
            return
        had_calls = bool(node.calls)
        node.die()
        if had_calls:
            self._suspect(node)
        self.time.after(after_s, partial(self._restart, node))

    def _restart(self, node: Node) -> None:
        node.start()
        self._observe(self.places[node.name])


def _engine(number: int, spec: EngineSpec) -> Engine:
    """What the router keeps of an engine. Its connections are never used."""
    address = EngineAddress(spec.name, spec.role, "builtin", "", 0, slot=number, inline=spec.inline_prefill)
    return Engine(address, ConnectionPool("", 0), dialect("builtin", ""), number, b"", condition=Condition(False))
