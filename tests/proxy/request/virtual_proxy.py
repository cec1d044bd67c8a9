"""The proxy's admission in front of prefill engines, in virtual time: the classes that ship, behind a clock that jumps.

A prompt is computed by the engine's own scheduler. Its decode takes one TPOT per token and a seat.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.front.api.targets import priority_in
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.batch import Limits, Outcome
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.engine.virtual import VirtualEngine, VirtualTime
from pdctl.latency import StepTimes
from pdctl.proxy.engines.outlook import Outlook
from pdctl.proxy.request.admission import Admission, Refusal
from pdctl.proxy.shares.fair_queue import FairQueue, Waiter, Work
from pdctl.proxy.shares.rules import KeyRules
from pdctl.proxy_wire import KeySettings
from pdctl.wire import ORDER_HEADER

# Of Gemma 3 270M in float32 on one core (docs/performance.md).
TIMES = StepTimes((0.065, 2.3e-3, 4e-7, 4e-3, 2e-6))
_BUDGET, _BLOCK, _BLOCKS, _LONGEST = 512, 16, 6000, 16_384


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a key. Tokens."""

    key: str
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one key: Poisson arrivals at `rate` per second, prompts of lognormal lengths around `prompt`."""

    key: str
    rate: float
    prompt: int = 800
    output: int = 64
    spread: float = 0.6

    def arrivals(self, seconds: float, seed: int) -> list[tuple[float, Request]]:
        """The same ones, whatever other keys send."""
        rng, at, found = random.Random(f"{self.key}{seed}"), 0.0, list[tuple[float, Request]]()
        while (at := at + rng.expovariate(self.rate)) < seconds:
            prompt = min(_LONGEST // 2, int(self.prompt * rng.lognormvariate(0.0, self.spread)) + 1)
            found.append((at, Request(self.key, prompt, rng.randint(self.output // 2, self.output * 3 // 2))))
        return found


@dataclass
class Results:
    """By key: seconds to the first token, tokens of prompts and outputs, and refused requests."""

    ttft_s: dict[str, list[float]] = field(default_factory=dict)
    served: dict[str, float] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)

    def ttft(self, key: str, part: float) -> float:
        """A quantile of a key's times to first token."""
        waits = sorted(self.ttft_s[key])
        return waits[min(len(waits) - 1, int(len(waits) * part))]


class VirtualProxy:
    """`prefills` engines and `seats` of decode engines. `fair` is False for a proxy that treats all requests as those
    of one key."""

    def __init__(
        self,
        keys: tuple[KeySettings, ...] = (),
        prefills: int = 1,
        seats: int = 16,
        policy: str = "fcfs",
        tpot_s: float = 0.05,
        max_queue: int = 256,
        fair: bool = True,
    ) -> None:
        self.time = VirtualTime()
        self.results = Results()
        self.admission = Admission(max_queue, 60.0, 2.0, 0.2, by_slo=False, queue=FairQueue(KeyRules(keys)))
        self._seats, self._tpot_s, self._fair = seats, tpot_s, fair
        limits = Limits(64, _BUDGET, _LONGEST, _BLOCK, frozenset(), policy=policy)
        self.engines = [
            VirtualEngine(self.time, Scheduler(limits, BlockAllocator(_BLOCKS), clock=self.time), TIMES, self._got)
            for _ in range(prefills)
        ]
        self._requests: dict[Waiter, Request] = {}
        self._at_engines: dict[str, Waiter] = {}
        self._sent = 0

    def run(self, *loads: Load, seconds: float, seed: int = 1) -> Results:
        """Everything that arrives within so many seconds is served or refused."""
        for load in loads:
            for at, request in load.arrivals(seconds, seed):
                self.time.at(at, partial(self._arrive, request))
        self.time.run()
        assert not self._requests
        assert self.admission.running == self.admission.waiting == 0
        self.admission.audit()
        return self.results

    def _outlook(self, tokens: float = 0.0) -> Outlook:
        return Outlook(self._seats, 0.0, True, tokens, 2.0 * _BUDGET * len(self.engines), len(self.engines))

    def _arrive(self, request: Request) -> None:
        key, now = request.key if self._fair else "-", self.time()
        found = self.admission.ask(key, 0, self._outlook(request.prompt), now, 2 * request.output)
        for waiter, _ in self.admission.take_pushed_out():
            self._refuse(self._requests.pop(waiter))
        if isinstance(found, Refusal):
            self._refuse(request)
            return
        self._requests[found] = request
        if found.granted:
            self._start(found)
        else:
            self.time.at(now + self.admission.patience_s, partial(self._give_up, found))

    def _refuse(self, request: Request) -> None:
        self.results.refused[request.key] = self.results.refused.get(request.key, 0) + 1

    def _give_up(self, waiter: Waiter) -> None:
        if waiter in self._requests and not waiter.granted:
            self.admission.leave(waiter)
            self._refuse(self._requests.pop(waiter))

    def _move_on(self) -> None:
        while (waiter := self.admission.next(self._outlook(), self.time())) is not None:
            self._start(waiter)

    def _start(self, waiter: Waiter) -> None:
        name, request = str(self._sent), self._requests[waiter]
        self._sent += 1
        self._at_engines[name] = waiter
        order = {ORDER_HEADER: str(waiter.order)} if self._fair else {}
        sequence = Sequence(name, [0] * request.prompt, request.prompt, Sampling(max_tokens=1))
        sequence.priority = priority_in(order, 0)
        self.engines[self._sent % len(self.engines)].add(sequence)

    def _got(self, outcome: Outcome) -> None:
        for token in outcome.tokens:
            waiter = self._at_engines.pop(token.request_id)
            request, now = self._requests[waiter], self.time()
            self.results.ttft_s.setdefault(request.key, []).append(now - waiter.since)
            self.admission.prefilled(waiter)
            self.time.at(now + request.output * self._tpot_s, partial(self._end, waiter))
        self.time.at(self.time(), self._move_on)

    def _end(self, waiter: Waiter) -> None:
        request = self._requests.pop(waiter)
        work = Work(request.prompt, request.output)
        self.results.served[request.key] = self.results.served.get(request.key, 0.0) + work.cost
        self.admission.done(waiter, self.time(), self._tpot_s, work)
        self._move_on()
