"""Requests with the same beginning: blocks are shared, and nothing else changes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.engine.cache.prefix import salt_of
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.prompts.policies import POLICIES
from pdctl.engine.schedule.sequence import Sequence, Status
from tests.engine.schedule.engine import BLOCK, Engine


def test_the_second_of_two_equal_prompts_computes_one_block_at_most() -> None:
    engine = Engine()
    engine.add("a", list(range(16)))
    engine.run()
    engine.add("b", list(range(16)))
    batch = engine.step()
    assert [(piece.start, piece.count) for piece in batch] == [(12, 4)], "the last token is always computed"
    engine.run()
    assert engine.outputs["a"] == engine.outputs["b"]
    assert (engine.cached["a"], engine.cached["b"]) == (0, 12)
    books = engine.scheduler.books(0)
    assert (books.prefix_tokens, books.prefix_hits) == (32, 12)
    assert books.blocks_free == 64
    assert books.blocks_idle > 0


def test_an_answer_is_found_in_the_next_turn() -> None:
    engine = Engine()
    engine.add("first", list(range(8)), output=9)
    engine.run()
    history = [*range(8), *engine.outputs["first"]]
    engine.add("second", [*history, 50, 51])
    engine.run()
    assert engine.cached["second"] == 16, "8 tokens of the prompt and 8 of the answer; its last one was never computed"


def test_running_sequences_share_too() -> None:
    engine = Engine(blocks=12)
    engine.add("a", list(range(20)), output=12)
    engine.step()
    engine.add("b", [*range(20), 70], output=2)
    engine.step()
    running = {sequence.request_id: sequence.block_ids for sequence in engine.scheduler.running}
    assert running["a"][:5] == running["b"][:5]
    engine.scheduler.abort("a")
    engine.scheduler.audit()
    engine.run()
    assert engine.scheduler.allocator.num_free == 12


@pytest.mark.parametrize("salts", [("x", "y"), ("", "y"), ("x", "")])
def test_other_salts_share_nothing(salts: tuple[str, str]) -> None:
    engine = Engine()
    for name, salt in zip("ab", salts, strict=True):
        engine.add(name, list(range(16)), salt=salt)
        engine.run()
    assert engine.cached["b"] == 0


def test_log_probabilities_of_a_prompt_need_all_of_it() -> None:
    engine = Engine()
    engine.add("a", list(range(16)))
    engine.run()
    sampling = Sampling(max_tokens=1, prompt_logprobs=0)
    engine.scheduler.add(Sequence("b", list(range(16)), 16, sampling))
    assert [piece.start for piece in engine.step()] == [0]


def test_a_hand_over_reads_only_what_is_not_here() -> None:
    engine = Engine()
    engine.add("a", list(range(16)))
    engine.run()
    engine.add("b", list(range(20)), status=Status.AWAITING_BLOCKS, kv_tokens=19)
    (reserved,) = engine.scheduler.reserve()
    assert reserved.num_cached == 16
    # The transfer fails, perhaps still writing: the shared blocks must not be lost with it.
    assert engine.scheduler.pull_started("b")
    engine.scheduler.pull_ended("b", uncertain=True)
    assert engine.scheduler.allocator.num_quarantined == 1
    engine.scheduler.audit()
    engine.scheduler.pull_settled("b")
    engine.add("c", list(range(20)))
    engine.run()
    assert engine.cached["c"] == 16
    assert engine.scheduler.allocator.num_free == 64


def test_pulled_blocks_are_found_after_the_commit_only() -> None:
    engine = Engine()
    engine.add("a", list(range(13)), status=Status.AWAITING_BLOCKS, kv_tokens=12)
    (reserved,) = engine.scheduler.reserve()
    engine.add("early", list(range(13)))
    assert engine.step()[0].start == 0
    engine.scheduler.abort("early")
    assert engine.scheduler.pull_started("a")
    for at in range(12):
        engine.slots[reserved.block_ids[at // BLOCK] * BLOCK + at % BLOCK] = tuple(range(at + 1))
    engine.scheduler.pull_ended("a")
    assert engine.scheduler.start("a")
    engine.add("late", list(range(13)))
    assert [piece.start for piece in engine.step() if piece.sequence.request_id == "late"] == [12]
    engine.run()


def test_blocks_read_ahead_of_their_request_belong_to_its_salt() -> None:
    engine = Engine()
    engine.scheduler.add(Sequence("a", [], 0, Sampling(1), kv_tokens=12, status=Status.AWAITING_BLOCKS))
    (reserved,) = engine.scheduler.reserve()
    assert engine.scheduler.pull_started("a")
    for at in range(12):
        engine.slots[reserved.block_ids[at // BLOCK] * BLOCK + at % BLOCK] = tuple(range(at + 1))
    engine.add("a", list(range(13)), salt="x", status=Status.AWAITING_BLOCKS, kv_tokens=12)
    engine.scheduler.pull_ended("a")
    assert engine.scheduler.start("a")
    engine.run()
    for name, salt, found in (("same", "x", 12), ("none", "", 0), ("other", "y", 0)):
        engine.add(name, list(range(13)), salt=salt)
        engine.run()
        assert engine.cached[name] == found


def test_one_api_key_does_not_drive_out_what_others_keep() -> None:
    """Whatever salts its clients choose."""
    engine = Engine(blocks=32, quota=12)
    few, many = salt_of("few", None), [salt_of("many", f"salt {number}") for number in range(20)]
    engine.add("a", list(range(16)), salt=few)
    engine.run()
    for number, salt in enumerate(many):
        engine.add(f"b{number}", [100 + number, *range(30)], salt=salt)
        engine.run()
    engine.add("again", list(range(16)), salt=few)
    engine.run()
    assert engine.cached["again"] == 12
    engine.scheduler.audit()


def test_of_a_part_that_came_only_that_part_is_found() -> None:
    engine, prompt = Engine(), list(range(17))
    waiting = offered(engine, "load", prompt[:16])
    assert engine.scheduler.pull_started("load")
    engine.write(waiting, 0, prompt[:8])
    engine.scheduler.pull_ended("load")
    engine.scheduler.keep("load", 0, 8)
    engine.scheduler.audit()
    engine.add("a", prompt)
    engine.run()
    assert engine.cached["a"] == 8


def offered(engine: Engine, name: str, tokens: list[int], salt: str = "") -> Sequence:
    """Blocks for a prompt of which a peer has told the tokens, before the request itself is here."""
    given = Sequence(
        name, list(tokens), 0, Sampling(1), kv_tokens=len(tokens), salt=salt, status=Status.AWAITING_BLOCKS
    )
    assert engine.scheduler.add(given) is None
    (reserved,) = engine.scheduler.reserve()
    return reserved


def pulled(engine: Engine, sequence: Sequence, tokens: list[int]) -> None:
    assert engine.scheduler.pull_started(sequence.request_id)
    engine.write(sequence, sequence.num_cached, tokens)
    engine.scheduler.pull_ended(sequence.request_id)


def test_a_prompt_that_is_read_in_chunks_reads_only_what_is_not_here() -> None:
    engine, prompt = Engine(), list(range(20))
    engine.add("first", prompt[:13], salt="x")
    engine.run()
    reserved = offered(engine, "second", prompt, salt="x")
    assert reserved.num_cached == 12
    assert not reserved.num_computed
    pulled(engine, reserved, prompt)
    engine.add("second", [*prompt, 77], salt="x", kv_tokens=20, status=Status.AWAITING_BLOCKS)
    assert engine.scheduler.start("second")
    engine.run()
    engine.add("third", [*prompt, 78], salt="x")
    engine.run()
    assert engine.cached["third"] == 20
    assert engine.scheduler.allocator.num_free == 64


@pytest.mark.parametrize(("other", "salt"), [(0, "y"), (0, ""), (1, "x")])
def test_an_offer_with_other_tokens_or_another_salt_than_its_request_is_lost(other: int, salt: str) -> None:
    engine, prompt = Engine(), list(range(20))
    engine.add("first", prompt, salt="x")
    engine.run()
    pulled(engine, offered(engine, "second", prompt, salt="x"), prompt)
    request = [*prompt[:19], prompt[19] + other, 77]
    given = Sequence("second", request, 21, Sampling(2), kv_tokens=20, salt=salt, status=Status.AWAITING_BLOCKS)
    failed = engine.scheduler.add(given)
    assert failed is not None
    assert "other tokens" in failed.reason
    assert not engine.scheduler.start("second")
    engine.audit()
    assert engine.scheduler.allocator.num_free == 64


def test_with_segments_only_whole_ones_are_found() -> None:
    engine = Engine(segment=8)
    engine.add("a", list(range(22)), output=30)
    engine.run()
    for length, found in ((22, 16), (17, 16), (16, 8), (12, 8), (8, 0)):
        engine.add(f"b{length}", list(range(length)))
        engine.run()
        assert engine.cached[f"b{length}"] == found
    # Its own answer was computed token by token, which may round differently.
    engine.add("c", [*range(22), *engine.outputs["a"]])
    engine.run()
    assert engine.cached["c"] == 16
    assert engine.scheduler.allocator.num_free == 64


@pytest.mark.parametrize(("theirs", "found"), [(8, 16), (0, 0), (16, 0)])
def test_pulled_kv_is_found_if_it_was_computed_in_the_same_segments(theirs: int, found: int) -> None:
    engine, prompt = Engine(segment=8), list(range(21))
    engine.add("a", prompt, status=Status.AWAITING_BLOCKS, kv_tokens=20, kv_segment=theirs)
    (reserved,) = engine.scheduler.reserve()
    pulled(engine, reserved, prompt[:20])
    assert engine.scheduler.start("a")
    engine.run()
    engine.add("b", prompt)
    engine.run()
    assert engine.cached["b"] == found


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(12, 40), st.integers(1, 5), st.integers(4, 40), st.sampled_from(sorted(POLICIES)),
    st.sampled_from((0, 8)), st.randoms(use_true_random=False),
)  # fmt: skip
def test_a_hit_never_changes_a_token(
    wanted: list[tuple[int, int, int]], blocks: int, seqs: int, tokens: int, policy: str, segment: int,
    chance: random.Random,
) -> None:  # fmt: skip
    """For any families of prompts, pools, budgets, policies, arrivals, aborts and preemptions. Every block that a
    sequence reads holds the KV of exactly its own tokens."""
    plain = Engine(blocks=64, shares=False)
    shared = Engine(blocks, max(tokens, segment + seqs), seqs, policy, segment=segment)
    asked = [([family, *range(length)], output) for family, length, output in wanted]
    for number, (prompt, output) in enumerate(asked):
        plain.add(str(number), prompt, output)
        plain.run()
    aborted = set()
    for number, (prompt, output) in enumerate(asked):
        shared.add(str(number), prompt, output, priority=chance.randint(0, 1))
        for _ in range(chance.randint(0, 4)):
            shared.step()
        if chance.random() < 0.15:
            victim = str(chance.randint(0, number))
            aborted.add(victim)
            shared.scheduler.abort(victim)
            shared.audit()
    shared.run()
    shared.audit()
    for name, expected in plain.outputs.items():
        found = shared.outputs.get(name, [])
        assert found == (expected[: len(found)] if name in aborted else expected)
    assert shared.scheduler.allocator.num_free == blocks


def test_what_a_peer_asks_for_is_held_until_it_has_read_it() -> None:
    engine = Engine(blocks=16)
    engine.add("a", list(range(16)))
    engine.run()
    found = engine.scheduler.find("lent", [*range(12), 70, 71, 72, 73], "")
    assert found.num_tokens == 12
    assert [engine.slots[block * BLOCK] for block in found.block_ids] == [tuple(range(at + 1)) for at in (0, 4, 8)]
    assert engine.scheduler.books(0).blocks_leased == 3
    engine.scheduler.audit()
    # All other blocks are needed: those that are held stay.
    engine.add("b", [*range(200, 240)], output=8)
    engine.run()
    assert [engine.slots[block * BLOCK] for block in found.block_ids] == [tuple(range(at + 1)) for at in (0, 4, 8)]
    engine.scheduler.abort("lent")
    engine.scheduler.audit()
    assert engine.scheduler.books(0).blocks_leased == 0
    assert engine.scheduler.allocator.num_free == 16


def test_nothing_is_held_for_a_peer_that_asks_for_what_is_not_here_or_too_much() -> None:
    engine = Engine(leased=3)
    engine.add("a", list(range(16)))
    engine.run()
    assert engine.scheduler.find("other", [70, *range(15)], "").num_tokens == 0
    assert engine.scheduler.find("salt", list(range(16)), "s").num_tokens == 0
    assert engine.scheduler.find("one", list(range(8)), "").num_tokens == 8
    assert engine.scheduler.find("one", list(range(8)), "").num_tokens == 0, "it is held already"
    assert engine.scheduler.find("two", list(range(8)), "").num_tokens == 0, "the limit of leased blocks"
    engine.scheduler.abort("one")
    assert engine.scheduler.find("two", list(range(8)), "").num_tokens == 8
    engine.scheduler.abort("two")
    engine.scheduler.audit()


def test_fetched_kv_is_found_by_the_next_and_its_request_ends() -> None:
    engine = Engine()
    reserved = offered(engine, "kv", list(range(12)), salt="x")
    pulled(engine, reserved, list(range(12)))
    engine.scheduler.keep("kv", 0)
    engine.scheduler.audit()
    assert engine.scheduler.sequences == {}
    assert engine.scheduler.allocator.num_free == 64
    engine.add("b", list(range(16)), salt="x")
    engine.run()
    assert engine.cached["b"] == 12
    engine.add("c", list(range(16)))
    engine.run()
    assert engine.cached["c"] == 0, "another salt"


def test_fetched_kv_of_a_request_that_is_gone_is_not_kept() -> None:
    engine = Engine()
    reserved = offered(engine, "kv", list(range(12)))
    assert engine.scheduler.pull_started("kv")
    engine.scheduler.abort("kv")
    engine.scheduler.keep("kv", 0)
    assert reserved.block_ids, "a pull still writes to them"
    engine.scheduler.pull_ended("kv")
    engine.scheduler.keep("kv", 0)
    engine.scheduler.audit()
    engine.add("b", list(range(16)))
    engine.run()
    assert engine.cached["b"] == 0


def test_kv_that_is_not_needed_yet_is_fetched_only_where_there_is_room() -> None:
    engine = Engine(blocks=8, seqs=2)
    assert engine.scheduler.has_room(32)
    assert not engine.scheduler.has_room(33)
    engine.add("a", list(range(20)), output=2)
    engine.step()
    assert not engine.scheduler.has_room(16)
    assert engine.scheduler.has_room(12)
    waiting = Sequence("w", [], 0, Sampling(1), kv_tokens=30, status=Status.AWAITING_BLOCKS)
    assert engine.scheduler.add(waiting) is None
    assert not engine.scheduler.has_room(4), "what waits for blocks goes first"
    engine.scheduler.abort("w")
    engine.run()
    large = Engine(blocks=200)
    assert large.scheduler.has_room(198 * BLOCK)
    assert not large.scheduler.has_room(199 * BLOCK), "two are left for sequences that grow"
