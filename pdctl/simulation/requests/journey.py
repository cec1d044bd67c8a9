"""One request of an imagined service, from its arrival to its end, as the proxy's relay leads it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pdctl.bench import Record
from pdctl.net.prefixes.beginnings import beginning_of
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.routing import Ask, EnginePair
from pdctl.proxy.request.course import Course
from pdctl.proxy.request.failover import Failure, GiveUp
from pdctl.proxy.shares.fair_queue import Waiter
from pdctl.simulation.requests.attempts import Pair, Place, Solo, Wanted
from pdctl.simulation.spec import Arrival

if TYPE_CHECKING:
    from pdctl.simulation.service import Service

# Bytes of a request per token of its prompt, about as in English text.
_TOKEN_BYTES = 4


class Journey:
    """`number`: of the request; `record`: what its client measures."""

    def __init__(self, service: Service, number: int, arrival: Arrival) -> None:
        self.arrival, self.record = arrival, Record(arrival.at, input_tokens=arrival.inputs)
        self.size = arrival.inputs * _TOKEN_BYTES
        self.emitted = 0
        self.is_over = False
        self.tries = 0
        self._service, self._number = service, number
        self._course = Course()
        self._newest_at = 0.0
        self._pieces = beginning_of(b"".join(token.to_bytes(_TOKEN_BYTES) for token in arrival.prompt)).pieces
        self._seat: Waiter | None = None
        self._deadline = 0.0

    # -- the way in ----------------------------------------------------------------------------------------

    def arrive(self) -> None:
        """The client sends it."""
        self.record.sent_at = self._service.time()
        self._service.door.ask(self)

    def seated(self, seat: Waiter) -> None:
        """It was admitted."""
        self._seat = seat
        self.record.parts["queue"] = self._service.time() - self.arrival.at
        self._service.budget.request()
        self.begin()

    def refused(self, reason: str) -> None:
        """It was not admitted."""
        self._end(f"refused: {reason}")

    # -- a try ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Choose engines; wait for one if none is ready."""
        service = self._service
        self._deadline = service.time() + service.failover.wait_for_engine_s
        service.request_number += 1
        spec = service.spec
        self.go_on(Ask(self.size, service.request_number, service.rng.random(), spec.ttft_s, spec.tpot_s))

    def go_on(self, ask: Ask) -> None:
        """The same, after engines have changed."""
        service, course = self._service, self._course
        pair = course.pair(service.fleet, service.policy, ask, self._pieces)
        if pair is not None:
            self._try(self._placed(pair, ask))
        elif service.time() >= self._deadline:
            self._end("no engine is ready")
        else:
            service.wait(partial(self.go_on, ask))

    def _placed(self, pair: EnginePair, ask: Ask) -> EnginePair:
        service = self._service
        if not self._course.may_be_inline(service.fleet, pair):
            return pair
        found = self._course.inline(service.fleet, pair, ask, self._pieces)
        service.placed[found[1] if found else "remote"] += 1
        return EnginePair(found[0], found[0]) if found else pair

    def _try(self, pair: EnginePair) -> None:
        service, spec, arrival = self._service, self._service.spec, self.arrival
        prefill, decode = service.places[pair.prefill], service.places[pair.decode]
        wanted = Wanted(
            self._prompt(), self.emitted, arrival.outputs, self.size, self._pieces, spec.ttft_s,
            spec.tpot_s,
        )  # fmt: skip
        name = f"{self._number}/{self.tries}"
        self.tries += 1
        one = self._course.one_engine(prefill.engine, decode.engine, arrival.outputs - self.emitted <= 1)
        if one is None:
            Pair(name, wanted, prefill, decode, service.wires, self)
        else:
            Solo(name, wanted, Place(service.places[one.name].node, one), service.wires, self)

    def _prompt(self) -> list[int]:
        return list(self.arrival.prompt) or [self._number] * self.arrival.inputs

    # -- the way out ---------------------------------------------------------------------------------------

    def token(self) -> None:
        """See Client."""
        now = self._service.time()
        if self.emitted:
            self.record.gaps.append(now - self._newest_at)
        else:
            self.record.first_at = now
            assert self._seat is not None
            self._service.door.prefilled(self._seat)
        self._newest_at = self._service.progress_at = now
        self.emitted += 1

    def done(self, prefill: str, decode: str) -> None:
        """See Client."""
        self.record.engines = {"prefill": prefill, "decode": decode}
        self._service.fleet.answered(self.size, self.arrival.inputs)
        self._end("")

    def failed(self, engine: Engine, failure: Failure) -> None:
        """See Client."""
        service, now = self._service, self._service.time()
        service.failures += 1
        decision = self._course.failed(
            failure, self.emitted, self.record.sent_at, now, service.budget, service.rng.random(), service.failover
        )
        if isinstance(decision, GiveUp):
            self._end(decision.message)
        else:
            service.time.after(decision.after_s, self.begin)

    def _end(self, error: str) -> None:
        assert not self.is_over, "a request ended twice"
        self.is_over = True
        record = self.record
        record.ended_at, record.output_tokens, record.error = self._service.time(), self.emitted, error
        assert error or self.emitted == self.arrival.outputs
        self._service.ended(self, self._seat)
