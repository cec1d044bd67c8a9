"""Policies on a day of traffic, in virtual time: the scheduler that ships behind a clock that jumps."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from statistics import median

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.ahead import LAUNCHED
from pdctl.engine.schedule.batch import Limits, Outcome
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.engine.virtual import VirtualEngine, VirtualTime
from pdctl.latency import StepTimes

TIMES = StepTimes((0.01, 0.001, 0.0, 0.0, 0.0))


class Traffic:
    """Prompts whose lengths and gaps vary as in public traces, with bursts; half of them with a near deadline."""

    def __init__(self, policy: str, load: float, count: int = 1500) -> None:
        self.time = VirtualTime()
        self.waits: dict[str, float] = {}
        self.targets: dict[str, float] = {}
        limits = Limits(8, 256, 16_384, 16, frozenset(), policy=policy)
        scheduler = Scheduler(limits, BlockAllocator(4000), clock=self.time)
        self.engine = VirtualEngine(self.time, scheduler, TIMES, self.got)
        rng = random.Random(3)
        lengths = [min(8000, int(rng.lognormvariate(6.0, 1.1))) + 1 for _ in range(count)]
        work = sum(0.001 * length + 0.01 * (length // 256 + 1) for length in lengths) / count
        moment = 0.0
        for number, length in enumerate(lengths):
            busy = 2.0 if number // 100 % 3 == 0 else 0.8  # bursts
            moment += rng.expovariate(busy * load / work)
            self.targets[str(number)] = work * rng.choice((3, 18))
            self.time.at(moment, partial(self.send, str(number), length))
        self.time.run()

    def send(self, name: str, length: int) -> None:
        self.waits[name] = -self.time()
        sequence = Sequence(name, [0] * length, length, Sampling(max_tokens=1), ttft_s=self.targets[name])
        self.engine.add(sequence)

    def got(self, outcome: Outcome) -> None:
        for token in outcome.tokens:
            self.waits[token.request_id] += self.time()
        self.engine.scheduler.audit()

    @property
    def attained(self) -> float:
        return sum(self.waits[name] <= target for name, target in self.targets.items()) / len(self.targets)


@pytest.mark.parametrize("load", [0.7, 0.9, 1.1])
def test_the_policies_do_what_they_are_for(load: float) -> None:
    fcfs, sjf, edf = (Traffic(policy, load) for policy in ("fcfs", "sjf", "edf"))
    for run in (fcfs, sjf, edf):
        assert min(run.waits.values()) > 0, "a request has no token"
        assert run.engine.scheduler.allocator.num_free == 4000
    assert median(sjf.waits.values()) < 0.6 * median(fcfs.waits.values())
    assert edf.attained > fcfs.attained + 0.1
    assert edf.attained > sjf.attained


def test_the_order_of_what_happens_at_one_moment() -> None:
    time, seen = VirtualTime(), list[tuple[str, float]]()
    time.at(2.0, lambda: seen.append(("second", time())))
    time.at(1.0, lambda: time.at(0.5, lambda: seen.append(("past is now", time()))))
    time.at(2.0, lambda: seen.append(("third", time())))
    time.run()
    assert seen == [("past is now", 1.0), ("second", 2.0), ("third", 2.0)]


def test_what_arrives_during_a_step_waits_for_its_end() -> None:
    time = VirtualTime()
    scheduler = Scheduler(Limits(8, 256, 4096, 16, frozenset()), BlockAllocator(100), clock=time)
    done: list[tuple[str, int]] = []  # milliseconds

    def got(outcome: Outcome) -> None:
        done.extend((token.request_id, round(time() * 1000)) for token in outcome.tokens)

    engine = VirtualEngine(time, scheduler, TIMES, got)
    engine.add(Sequence("first", [0] * 90, 90, Sampling(max_tokens=2)))
    time.at(0.05, lambda: engine.add(Sequence("second", [0] * 40, 40, Sampling(max_tokens=1))))
    time.at(0.101, lambda: engine.abort("first"))
    time.run()
    assert done == [("first", 100), ("first", 151), ("second", 151)]
    assert engine.steps == 2
    assert engine.busy_s == pytest.approx(0.151)


def test_what_arrives_during_a_step_waits_for_the_one_that_was_launched_ahead() -> None:
    time = VirtualTime()
    scheduler = Scheduler(Limits(8, 256, 4096, 16, frozenset()), BlockAllocator(100), clock=time)
    done: list[tuple[str, int]] = []  # milliseconds

    def got(outcome: Outcome) -> None:
        done.extend((token.request_id, round(time() * 1000)) for token in outcome.tokens)
        scheduler.audit()

    engine = VirtualEngine(time, scheduler, TIMES, got, schedules_ahead=True)
    engine.add(Sequence("first", [0] * 90, 90, Sampling(max_tokens=9)))
    # During the first decode step, when the second one is launched already.
    time.at(0.105, lambda: engine.add(Sequence("second", [0] * 39, 39, Sampling(max_tokens=1))))
    time.at(0.123, lambda: engine.abort("first"))
    time.run()
    assert done == [("first", 100), ("first", 111), ("first", 122), ("first", 172), ("second", 172)]


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=20),
    st.integers(40, 200),
)
@example([(0.0, 1, 2)], 40)
@example([(0.0, 129, 2)], 40)
def test_every_request_gets_its_tokens_with_steps_ahead(asked: list[tuple[float, int, int]], blocks: int) -> None:
    """A request alone has as many steps as without, and all of them are launched ahead that follow a decode."""
    budget, launched = 128, 0
    busy = []
    for schedules_ahead in (False, True):
        time = VirtualTime()
        scheduler = Scheduler(Limits(4, budget, 400, 16, frozenset()), BlockAllocator(blocks), clock=time)
        tokens: Counter[str] = Counter()

        def got(outcome: Outcome, tokens: Counter[str] = tokens, scheduler: Scheduler = scheduler) -> None:
            tokens.update(token.request_id for token in outcome.tokens)
            scheduler.audit()

        engine = VirtualEngine(time, scheduler, TIMES, got, schedules_ahead=schedules_ahead)
        for number, (moment, length, output) in enumerate(asked):
            sequence = Sequence(f"{number}", [0] * length, length, Sampling(max_tokens=output))
            time.at(moment, partial(engine.add, sequence))
        time.run()
        assert tokens == {f"{number}": output for number, (_, _, output) in enumerate(asked)}
        assert scheduler.allocator.num_free == blocks
        assert engine.busy_s <= time() + 1e-6
        busy.append(engine.busy_s)
        launched = scheduler.ahead.asked.get(LAUNCHED, 0)
    if len(asked) == 1:
        assert busy[0] == pytest.approx(busy[1])
        [(_, length, output)] = asked
        # The last chunk of a prompt is computed as a decode is, if that is one token.
        assert launched == max(0, output - 1 - (length % budget != 1))
