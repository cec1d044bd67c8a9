"""Prompts beside sequences that decode, in virtual time, through the scheduler that ships."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.batch import Limits, Slice
from pdctl.engine.schedule.inline import prompt_tokens
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Pace, Sequence, Status
from pdctl.latency import StepTimes, step_of

BLOCK, BUDGET = 16, 512
# A decode of four takes 12 ms, a token of a prompt 0.2 ms.
TRUE = StepTimes((0.01, 2e-4, 3e-8, 1e-4, 5e-7))


@dataclass
class Engine:
    """The scheduler with a clock that goes on by the true time of each step, and a model that knows it."""

    tpot_s: float
    now: float = 50.0
    at: dict[str, list[float]] = field(default_factory=dict)
    chunks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = LatencyModel()
        model.times = TRUE
        limits = Limits(16, BUDGET, 4096, BLOCK, frozenset())
        self.scheduler = Scheduler(limits, BlockAllocator(2000), model, lambda: self.now)

    def add(self, name: str, tokens: int, output: int, tpot_s: float = 0.0) -> None:
        sequence = Sequence(name, [7] * tokens, tokens, Sampling(output, ignore_eos=True), tpot_s=tpot_s or self.tpot_s)
        assert self.scheduler.add(sequence) is None

    def step(self) -> None:
        batch = self.scheduler.schedule()
        self.chunks.append(sum(piece.count for piece in batch if piece.count > 1))
        self.now += TRUE.seconds(step_of((piece.count, piece.start) for piece in batch))
        outcome = self.scheduler.update(batch, [8 for piece in batch if piece.samples])
        for token in outcome.tokens:
            self.at.setdefault(token.request_id, []).append(self.now)
        self.scheduler.audit()

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()

    def gaps(self, name: str) -> list[float]:
        times = self.at[name]
        return [after - before for before, after in itertools.pairwise(times)]


def beside_four(tpot_s: float, tokens: int = 3000) -> Engine:
    """Four sequences decode when a long prompt comes."""
    engine = Engine(tpot_s)
    for number in range(4):
        engine.add(str(number), 30, output=200)
    for _ in range(10):
        engine.step()
    engine.add("prompt", tokens, output=2)
    engine.run()
    return engine


def test_running_decodes_keep_their_target_beside_a_long_prompt() -> None:
    engine = beside_four(0.05)
    for number in range(4):
        times = engine.at[str(number)]
        assert (times[-1] - times[0]) / (len(times) - 1) <= 0.05
        # The slack of ten early tokens is used at once; then each step takes what is due.
        assert max(engine.gaps(str(number))[20:]) <= 0.05 + 1e-9
    without = beside_four(0.0)
    assert max(without.gaps("0")) > 0.1
    # The price is paid by the prompt.
    assert engine.at["prompt"][0] > without.at["prompt"][0]


def test_alone_a_prompt_takes_the_whole_budget() -> None:
    engine = Engine(0.05)
    engine.add("prompt", 3000, output=1)
    engine.run()
    assert engine.chunks[0] == BUDGET


def handed_over(engine: Engine, name: str, tokens: int, tpot_s: float = 0.0) -> None:
    """A sequence comes from a peer, with its first token."""
    target_s = tpot_s or engine.tpot_s
    sequence = Sequence(
        name, [7] * tokens + [8], tokens, Sampling(20, ignore_eos=True), kv_tokens=tokens, tpot_s=target_s,
        status=Status.AWAITING_BLOCKS,
    )  # fmt: skip
    assert engine.scheduler.add(sequence) is None
    assert engine.scheduler.reserve() == [sequence]
    sequence.num_computed = tokens
    assert engine.scheduler.start(name)


def test_where_sequences_are_handed_over_a_chunk_alone_leaves_time_for_the_next_one() -> None:
    engine = Engine(0.05)
    handed_over(engine, "first", 100)
    engine.run()
    engine.add("prompt", 3000, output=1)
    before = engine.now
    engine.step()
    assert engine.now - before <= 0.05
    assert engine.chunks[-1] >= BLOCK
    # Nothing has been handed over for a minute.
    engine.now += 61
    engine.step()
    assert engine.chunks[-1] == BUDGET


def test_the_first_step_of_a_sequence_from_a_peer_is_short() -> None:
    engine = Engine(0.2)
    engine.add("prompt", 3000, output=1)
    engine.step()
    handed_over(engine, "from-peer", 100)
    before = engine.now
    engine.step()
    alone = TRUE.seconds(step_of([(1, 100)]))
    # It has waited for the hand-over: its step is not filled up to its target.
    assert engine.at["from-peer"] == [engine.now]
    assert engine.now - before <= max(2 * alone, TRUE.seconds(step_of([(1, 100), (BLOCK, BUDGET)]))) + 1e-9
    engine.step()
    assert engine.chunks[-1] > engine.chunks[-2]


def test_a_target_that_cannot_be_kept_does_not_stop_prompts() -> None:
    # Decodes alone take 12 ms: prompts get as much time as they take, not more.
    engine = beside_four(0.001)
    assert max(engine.gaps("0")) <= 0.03
    assert len(engine.at["prompt"]) == 2
    chunks = [chunk for chunk in engine.chunks[10:] if chunk]
    assert min(chunks[:-1]) >= BLOCK


def test_a_request_can_have_its_own_target() -> None:
    engine = Engine(1.0)
    engine.add("strict", 30, output=100, tpot_s=0.03)
    engine.add("other", 30, output=100)
    for _ in range(5):
        engine.step()
    engine.add("prompt", 3000, output=2)
    engine.run()
    times = engine.at["strict"]
    assert (times[-1] - times[0]) / (len(times) - 1) <= 0.03


def decode_of(name: str, before: int, tpot_s: float, pace: Pace) -> Slice:
    sequence = Sequence(name, [1] * (before + 1), before, Sampling(10), num_computed=before, pace=pace, tpot_s=tpot_s)
    return Slice(sequence, before, 1, samples=True)


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 3), st.integers(0, 50)), max_size=8),
    st.floats(0.001, 1.0),
    st.floats(0.5, 1.0),
)
def test_a_step_is_done_when_the_first_token_is_due(
    decodes: list[tuple[int, float, int]], tpot_s: float, slow: float
) -> None:
    now = 100.0
    batch = [
        decode_of(str(number), before, tpot_s, Pace(now - age, now, later))
        for number, (before, age, later) in enumerate(decodes)
    ]
    limits = Limits(16, BUDGET, 4096, BLOCK, frozenset())
    found = prompt_tokens(batch, [], TRUE, limits, now)
    if not batch:
        assert found == BUDGET
        return
    step = step_of((piece.count, piece.start) for piece in batch)
    due = min(piece.sequence.pace.due(tpot_s) for piece in batch if piece.sequence.pace)
    allowed = max(due - now, 2 * TRUE.seconds(step))
    assert found >= BLOCK
    assert found == BLOCK or TRUE.seconds(step.with_prompt(found, 0)) <= allowed + 1e-9


def test_late_tokens_are_not_caught_up_with() -> None:
    late = Pace(first_at=0.0, newest_at=10.0, later=3)
    assert late.due(0.1) == pytest.approx(10.1)
    early = Pace(first_at=9.5, newest_at=10.0, later=30)
    assert early.due(0.1) == pytest.approx(9.5 + 3.1)


def test_without_inline_prefill_prompts_take_the_whole_budget() -> None:
    limits = Limits(16, BUDGET, 4096, BLOCK, frozenset(), keeps_tpot=False)
    batch = [decode_of("one", 100, 0.02, Pace(100.0, 100.0))]
    assert prompt_tokens(batch, [], TRUE, limits, 100.0) == BUDGET
