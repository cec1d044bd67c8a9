"""Who goes first: the policies, in virtual time, through the scheduler that ships."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.prompts.policies import POLICIES
from pdctl.engine.schedule.prompts.share import LONGEST_WAIT_S
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.names.policies import POLICY_NAMES

CHUNK, BLOCK = 64, 16
# Seconds that a step takes per token: what a latency model without measurements predicts.
PER_TOKEN = 0.001


@dataclass
class Engine:
    """The scheduler with a clock that goes on by the predicted time of each step. Every request wants one token."""

    policy: str
    blocks: int = 400
    seqs: int = 16
    now: float = 100.0
    first: dict[str, float] = field(default_factory=dict)
    shapes: list[list[tuple[str, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        limits = Limits(self.seqs, CHUNK, 4096, BLOCK, frozenset(), policy=self.policy)
        allocator = BlockAllocator(self.blocks)
        self.scheduler = Scheduler(limits, allocator, LatencyModel(), lambda: self.now)

    def add(self, name: str, tokens: int, priority: int = 0, ttft_s: float = 0.0, output: int = 1) -> None:
        sampling = Sampling(max_tokens=output)
        added = Sequence(name, [7] * tokens, tokens, sampling, priority=priority, ttft_s=ttft_s)
        assert self.scheduler.add(added) is None

    def step(self) -> None:
        batch = self.scheduler.schedule()
        self.shapes.append([(piece.sequence.request_id, piece.count) for piece in batch])
        self.now += max(1, sum(piece.count for piece in batch)) * PER_TOKEN
        outcome = self.scheduler.update(batch, [8 for piece in batch if piece.samples])
        for token in outcome.tokens:
            self.first.setdefault(token.request_id, self.now)
        self.scheduler.audit()

    def order(self) -> list[str]:
        """Run until nothing is left; the requests in the order of their first token."""
        while self.scheduler.has_work:
            self.step()
        return sorted(self.first, key=lambda name: self.first[name])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("fcfs", ["middle", "long", "short"]), ("sjf", ["short", "middle", "long"]), ("ljf", ["long", "middle", "short"])],
)
def test_the_order_of_what_waits(policy: str, expected: list[str]) -> None:
    engine = Engine(policy)
    for name, tokens in (("middle", 512), ("long", 1024), ("short", 128)):
        engine.add(name, tokens)
    assert engine.order() == expected


def test_deadlines_decide_and_what_is_too_late_goes_last() -> None:
    engine = Engine("edf")
    engine.add("lost", 1024, ttft_s=0.5)  # needs 1.02 s
    engine.add("later", 512, ttft_s=3.0)
    engine.add("soon", 512, ttft_s=1.0)
    assert engine.order() == ["soon", "later", "lost"]


def test_what_becomes_late_while_it_waits_goes_last() -> None:
    engine = Engine("edf", seqs=1)
    engine.add("first", 512, ttft_s=0.6)
    engine.add("missed", 512, ttft_s=0.7)  # feasible now, but not after `first`
    engine.add("possible", 128, ttft_s=0.9)
    assert engine.order() == ["first", "possible", "missed"]


def test_a_short_prompt_passes_a_long_one_at_the_end_of_a_chunk() -> None:
    engine = Engine("sjf")
    engine.add("long", 1024)
    engine.step()
    engine.add("short", 64)
    engine.step()
    assert engine.shapes == [[("long", 64)], [("short", 64)]]
    assert engine.order() == ["short", "long"]
    assert engine.scheduler.allocator.num_free == 400


def test_a_gain_below_a_step_is_not_worth_a_pass() -> None:
    engine = Engine("sjf")
    engine.add("current", 256)
    engine.step()
    engine.add("hardly shorter", 160)
    assert engine.order() == ["current", "hardly shorter"]


def test_fcfs_is_passed_only_by_priority() -> None:
    engine = Engine("fcfs")
    engine.add("first", 512)
    engine.step()
    engine.add("short", 16)
    engine.add("urgent", 64, priority=-1)
    assert engine.order() == ["urgent", "first", "short"]


def test_a_prompt_is_interrupted_four_times_at_most() -> None:
    engine = Engine("sjf")
    engine.add("long", 2048)
    for number in range(60):
        engine.step()
        if number % 2:
            engine.add(f"short-{number}", 64)
    engine.order()
    turns = ["long" in dict(shape) for shape in engine.shapes]
    pauses = sum(before and not after for before, after in itertools.pairwise(turns))
    assert pauses == 4 + 1, "the last one is its end"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_nothing_starves_under_a_steady_stream(policy: str) -> None:
    """An odd one against a stream that fills the engine and goes first by the policy."""
    tokens, other = (64, 512) if policy == "ljf" else (1024, 64)
    engine = Engine(policy, seqs=4)
    for number in range(3):
        engine.add(f"before-{number}", other)
    engine.add("odd", tokens, ttft_s=0.01)
    for number in itertools.count():
        engine.add(f"more-{number}", other, ttft_s=5.0)
        engine.step()
        if "odd" in engine.first:
            break
        assert engine.now < 100 + 2 * LONGEST_WAIT_S, f"{policy} starves it"


def test_what_has_waited_too_long_gets_a_part_of_the_work_and_not_all_of_it() -> None:
    """Otherwise every policy is first-come as soon as all prompts wait that long."""
    engine = Engine("sjf", seqs=1)
    for number in range(80):
        engine.add(f"long-{number}", 1024)
    while engine.now < 100 + 2 * LONGEST_WAIT_S:
        engine.add(f"short-{len(engine.shapes)}", 128)
        engine.step()
    began = len(engine.shapes)
    for number in range(4000):
        if number % 2 == 0:
            engine.add(f"late-{number}", 128)
        engine.step()
    tokens = Counter[str]()
    for shape in engine.shapes[began:]:
        for name, count in shape:
            tokens[name.partition("-")[0]] += count
    assert tokens["long"] / tokens.total() == pytest.approx(1 / 8, abs=0.01)
    done = [name for name in engine.first if name.startswith("long")]
    assert done == [f"long-{number}" for number in range(len(done))], "the one that has waited longest is next"


def test_the_first_in_order_takes_the_blocks_of_a_prompt_that_it_passes() -> None:
    engine = Engine("sjf", blocks=66)
    engine.add("long", 1024)  # 64 of 66 blocks
    engine.step()
    engine.add("short", 128)  # 8 blocks
    assert engine.order() == ["short", "long"]
    assert engine.scheduler.allocator.num_free == 66


def test_prompts_that_take_each_others_blocks_come_to_an_end() -> None:
    engine = Engine("sjf", blocks=66)
    engine.add("long", 1024)
    for number in range(6):
        engine.step()
        engine.add(f"short-{number}", 900 - 100 * number, output=3)
    assert len(engine.order()) == 7


def test_partial_prompts_are_few() -> None:
    engine = Engine("sjf", blocks=4000)
    for number in range(10):
        engine.add(str(number), 2000 - 150 * number)
        engine.step()
        assert len(engine.scheduler.running.partial) <= 4
    assert len(engine.order()) == 10


def test_a_topology_knows_every_policy() -> None:
    assert set(POLICY_NAMES) == set(POLICIES)
