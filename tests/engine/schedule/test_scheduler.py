from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import TypedDict, Unpack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.batch import Limits, Outcome, Slice
from pdctl.engine.schedule.prompts.policies import POLICIES
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence, Status

EOS = 99


def make(
    blocks: int = 32, block_size: int = 4, seqs: int = 4, tokens: int = 8, longest: int = 64, leased: int = 10**6,
    policy: str = "fcfs", clock: Callable[[], float] = time.monotonic,
) -> Scheduler:  # fmt: skip
    limits = Limits(seqs, tokens, longest, block_size, frozenset({EOS}), leased, policy)
    return Scheduler(limits, BlockAllocator(blocks), clock=clock)


class Options(TypedDict, total=False):
    """Fields of a Sequence that most tests leave as they are."""

    hold: bool
    offer: bool
    status: Status
    kv_tokens: int
    priority: int
    ttft_s: float


def sequence(name: str, prompt: int, output: int = 4, **options: Unpack[Options]) -> Sequence:
    return Sequence(name, list(range(prompt)), prompt, Sampling(max_tokens=output), **options)


def model(piece: Slice) -> int:
    """A stand-in for the model: the next token depends only on the tokens before it."""
    return hash(tuple(piece.sequence.token_ids)) % 97


def step(scheduler: Scheduler) -> tuple[list[Slice], Outcome]:
    batch = scheduler.schedule()
    assert sum(piece.count for piece in batch) <= scheduler.limits.max_num_batched_tokens
    assert len({id(piece.sequence) for piece in batch}) == len(batch)
    for piece in batch:
        assert piece.count > 0
        assert len(piece.sequence.block_ids) * scheduler.limits.block_size >= piece.start + piece.count
    outcome = scheduler.update(batch, [model(piece) for piece in batch if piece.samples])
    scheduler.audit()
    return batch, outcome


def drain(scheduler: Scheduler, most: int = 2000) -> dict[str, list[int]]:
    """Run steps until nothing is left; returns the outputs by request."""
    outputs: dict[str, list[int]] = {}
    for _ in range(most):
        if not scheduler.has_work:
            return outputs
        _, outcome = step(scheduler)
        for token in outcome.tokens:
            outputs.setdefault(token.request_id, []).append(token.token_id)
    raise AssertionError("requests starve")


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=10),
    st.integers(12, 40), st.integers(1, 5), st.integers(4, 40), st.sampled_from(sorted(POLICIES)),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_every_request_finishes_with_the_same_tokens(
    wanted: list[tuple[int, int]], blocks: int, seqs: int, tokens: int, policy: str, chance: random.Random
) -> None:
    """For any budgets, policies, priorities, arrivals and preemptions, the tokens are those of an engine without other
    requests."""
    expected: dict[str, list[int]] = {}
    for index, (prompt, output) in enumerate(wanted):
        alone = make(blocks=64, tokens=64)
        alone.add(sequence(str(index), prompt, output))
        expected |= drain(alone)
    now = 0.0
    scheduler = make(blocks=blocks, seqs=seqs, tokens=tokens, policy=policy, clock=lambda: now)
    outputs: dict[str, list[int]] = {}
    queue = list(enumerate(wanted))
    while queue or scheduler.has_work:
        if queue and chance.random() < 0.5:
            index, (prompt, output) = queue.pop(0)
            urgent = sequence(str(index), prompt, output, priority=chance.randint(-1, 1), ttft_s=chance.random())
            assert scheduler.add(urgent) is None
        _, outcome = step(scheduler)
        now += chance.random()
        for token in outcome.tokens:
            outputs.setdefault(token.request_id, []).append(token.token_id)
    assert outputs == expected
    assert scheduler.allocator.num_free == blocks


@settings(max_examples=100)
@given(st.lists(st.sampled_from(
    ["add", "hold", "await", "pull", "pulled", "uncertain", "settled", "start", "abort", "step"]), max_size=80),
       st.randoms(use_true_random=False))  # fmt: skip
def test_any_order_of_events_keeps_the_books(events: list[str], chance: random.Random) -> None:  # noqa: C901 - one branch an event
    scheduler = make(blocks=24, seqs=3, tokens=6, leased=12)
    late: set[str] = set()
    pulling: Counter[str] = Counter()
    pulled: set[str] = set()
    names: list[str] = []
    for number, event in enumerate(events):
        name = chance.choice(names) if names else ""
        if event in ("add", "hold", "await"):
            name = str(number)
            names.append(name)
            prompt = chance.randint(1, 20)
            options: Options = {"hold": event == "hold", "offer": event == "hold" and chance.random() < 0.5}
            if event == "await" and prompt > 1:
                options |= {"status": Status.AWAITING_BLOCKS, "kv_tokens": prompt - 1}
            scheduler.add(sequence(name, prompt, 5, **options))
            scheduler.reserve()
        elif event == "pull" and scheduler.pull_started(name):
            pulling[name] += 1
            pulled.discard(name)
        elif event == "pulled" and pulling[name]:
            pulling[name] -= 1
            pulled.add(name)
            scheduler.pull_ended(name)
        elif event == "uncertain" and pulling[name] == 1:
            pulling[name] -= 1
            late.add(name)
            owned = scheduler.allocator.owned(name)
            scheduler.pull_ended(name, uncertain=True)
            assert all(not scheduler.allocator._free[block] for block in owned), "freed while bytes may still land"
        elif event == "settled" and name in late:
            late.discard(name)
            scheduler.pull_settled(name)
        elif event == "start" and name in pulled and not pulling[name]:
            scheduler.start(name)
        elif event == "abort":
            before = len(scheduler.allocator.owned(name))
            scheduler.abort(name)
            if pulling[name]:
                assert len(scheduler.allocator.owned(name)) == before, "blocks freed while they are written to"
        elif event == "step":
            step(scheduler)
        scheduler.audit()
        books = scheduler.books(0)
        counted = (books.blocks_free, books.blocks_referenced, books.blocks_leased, books.blocks_quarantined)
        assert sum(counted) == 24
        assert min(counted) >= 0
    for name in names:
        scheduler.abort(name)
    for name in late:
        scheduler.pull_settled(name)
    for name in pulling.elements():
        scheduler.pull_ended(name)
    scheduler.audit()
    assert scheduler.allocator.num_free == 24, "something is left"


def test_long_prompts_are_computed_in_chunks_beside_decodes() -> None:
    scheduler = make(tokens=8)
    scheduler.add(sequence("short", 3, output=20))
    step(scheduler)
    scheduler.add(sequence("long", 30))
    shapes = [[(piece.sequence.request_id, piece.count) for piece in step(scheduler)[0]] for _ in range(7)]
    assert shapes[0] == [("short", 1), ("long", 4)], "a chunk ends at the border of a block"
    assert shapes[5] == [("short", 1), ("long", 4)]
    assert shapes[6] == [("short", 1), ("long", 6)], "but its last one at the prompt's"


def test_a_held_prefill_keeps_its_blocks_until_freed() -> None:
    scheduler = make()
    scheduler.add(sequence("a", 10, output=1, hold=True))
    held = []
    for _ in range(3):
        held += step(scheduler)[1].held
    assert [(h.request_id, h.num_tokens, len(h.block_ids)) for h in held] == [("a", 10, 3)]
    assert scheduler.books(1).blocks_leased == 3
    assert not scheduler.has_work
    scheduler.abort("a")
    assert scheduler.allocator.num_free == 32


def test_a_held_prefill_that_meets_eos_ends() -> None:
    scheduler = make(tokens=64)
    scheduler.add(sequence("a", 10, output=5, hold=True))
    outcome = scheduler.update(scheduler.schedule(), [EOS])
    assert [(t.token_id, t.finish_reason) for t in outcome.tokens] == [(EOS, "stop")]
    assert outcome.held == []
    assert scheduler.allocator.num_free == 32


def test_a_handed_over_sequence_decodes_without_prefill() -> None:
    scheduler = make()
    scheduler.add(sequence("a", 10, output=5, status=Status.AWAITING_BLOCKS, kv_tokens=9))
    assert [s.request_id for s in scheduler.reserve()] == ["a"]
    assert scheduler.schedule() == [], "not before its KV is certified"
    assert scheduler.pull_started("a")
    scheduler.pull_ended("a")
    assert scheduler.start("a")
    batch = scheduler.schedule()
    assert [(piece.start, piece.count, piece.samples) for piece in batch] == [(9, 1, True)]


def test_an_impossible_request_is_refused_at_once() -> None:
    scheduler = make(blocks=4, longest=1000)
    failed = scheduler.add(sequence("a", 10, output=100))
    assert failed is not None
    assert "raise kv_cache_gb" in failed.reason
    scheduler.audit()


def test_the_newest_is_preempted_and_the_oldest_goes_on() -> None:
    scheduler = make(blocks=4, seqs=2, tokens=16, longest=16)
    scheduler.add(sequence("old", 7, output=9))
    scheduler.add(sequence("new", 7, output=9))
    step(scheduler)
    while len(scheduler.running) == 2:
        step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["old"]
    outputs = drain(scheduler)
    assert outputs["old"]
    assert outputs["new"]


@pytest.mark.parametrize("limit", [1, 3])
def test_seats_are_never_exceeded(limit: int) -> None:
    scheduler = make(seqs=limit, tokens=64)
    for index in range(6):
        waiting: Options = {"status": Status.AWAITING_BLOCKS, "kv_tokens": 3} if index % 2 else {}
        scheduler.add(sequence(str(index), 4, **waiting))
    for sequence_ in scheduler.reserve():
        scheduler.pull_started(sequence_.request_id)
        scheduler.pull_ended(sequence_.request_id)
        scheduler.start(sequence_.request_id)
    batch, _ = step(scheduler)
    assert len(batch) == limit


def test_prefills_for_peers_wait_at_the_ceiling_and_others_pass_them() -> None:
    scheduler = make(blocks=32, tokens=64, leased=6)
    scheduler.add(sequence("a", 12, hold=True))  # 3 blocks
    scheduler.add(sequence("b", 12, hold=True))
    scheduler.add(sequence("c", 12, hold=True))
    scheduler.add(sequence("own", 12))
    batch, _ = step(scheduler)
    assert [piece.sequence.request_id for piece in batch] == ["a", "b", "own"]
    assert scheduler.books(0).held_back == 1
    drain(scheduler)
    idle = not scheduler.has_work
    assert idle, "waiting for peers is no work"
    scheduler.abort("a")
    assert scheduler.has_work
    assert [piece.sequence.request_id for piece in step(scheduler)[0]] == ["c"]


def test_one_prefill_larger_than_the_ceiling_is_not_refused_for_ever() -> None:
    scheduler = make(tokens=64, leased=2)
    scheduler.add(sequence("big", 20, hold=True))
    assert [piece.count for piece in step(scheduler)[0]] == [20]


def test_chunks_of_an_offered_prefill_are_reported_as_they_are_computed() -> None:
    scheduler = make(tokens=8)
    scheduler.add(sequence("a", 20, hold=True, offer=True))
    reports = [(p.num_computed, len(p.block_ids)) for _ in range(2) for p in step(scheduler)[1].progress]
    assert reports == [(8, 5), (16, 5)]
    outcome = step(scheduler)[1]
    assert outcome.progress == []
    assert [held.num_tokens for held in outcome.held] == [20]


def test_a_preempted_offer_is_withdrawn() -> None:
    scheduler = make(blocks=8, block_size=4, seqs=3, tokens=4, longest=32)
    scheduler.add(sequence("grows", 8, output=20))
    step(scheduler)
    step(scheduler)
    scheduler.add(sequence("offered", 20, hold=True, offer=True))
    withdrawn, progress = [], []
    for _ in range(20):
        outcome = step(scheduler)[1]
        withdrawn += outcome.withdrawn
        progress += outcome.progress
    assert progress, "nothing was offered"
    assert not scheduler.sequences["offered"].offer, "it is offered once"


def test_blocks_reserved_ahead_become_the_requests() -> None:
    scheduler = make()
    scheduler.add(Sequence("kv", [], 0, Sampling(1), kv_tokens=9, status=Status.AWAITING_BLOCKS))
    assert [s.request_id for s in scheduler.reserve()] == ["kv"]
    assert scheduler.pull_started("kv")
    scheduler.add(sequence("kv", 10, output=5, status=Status.AWAITING_BLOCKS, kv_tokens=9))
    scheduler.pull_ended("kv")
    scheduler.audit()
    assert scheduler.start("kv")
    assert [(p.start, p.count, p.samples) for p in scheduler.schedule()] == [(9, 1, True)]


def test_a_piece_that_began_before_the_last_ones_end_was_known_keeps_its_blocks() -> None:
    """The front requests the next piece as soon as one ends; a step may delay this message here."""
    scheduler = make()
    scheduler.add(sequence("a", 10, output=5, status=Status.AWAITING_BLOCKS, kv_tokens=9))
    scheduler.reserve()
    assert scheduler.pull_started("a")
    assert scheduler.pull_started("a")
    scheduler.pull_ended("a")
    scheduler.abort("a")
    assert len(scheduler.allocator.owned("a")) == 3, "freed while they are written to"
    scheduler.pull_ended("a")
    assert scheduler.allocator.num_free == 32
    scheduler.audit()


def test_a_prompt_that_never_fits_is_told_what_would_hold_it() -> None:
    scheduler = make(blocks=8, block_size=4, longest=512)
    failed = scheduler.add(sequence("long", 70, 20))
    assert failed is not None
    assert "needs 23 KV blocks and the engine has 8" in failed.reason
    assert "raise kv_cache_gb at least 3 times" in failed.reason
    assert not scheduler.sequences
    assert scheduler.add(sequence("fits", 28, 4)) is None
