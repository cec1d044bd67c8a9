"""Sequences that are held in the middle of their answer."""

from __future__ import annotations

import pytest

from pdctl.engine.schedule.batch import Batch, Outcome
from pdctl.engine.schedule.peers import moves
from pdctl.engine.schedule.sequence import Status
from pdctl.speculative import Speculative
from tests.engine.schedule.engine import BLOCK, Engine, cyclic

PROMPT = [1, 2, 3, 4, 5]


def run(engine: Engine, name: str) -> Outcome:
    """Step until something is held or offered."""
    while True:
        _, outcome = engine.step_with_outcome()
        engine.audit()
        if outcome.held or outcome.progress or name not in engine.scheduler.sequences:
            return outcome


@pytest.mark.parametrize("at", range(12))
def test_what_is_offered_is_what_is_held(at: int) -> None:
    engine = Engine()
    engine.add("a", PROMPT, output=30)
    for _ in range(1 + at):
        engine.step_with_outcome()
    engine.scheduler.move("a", offer=True)
    (offered,) = run(engine, "a").progress
    assert offered.num_computed == len(PROMPT) + at + 1
    (held,) = run(engine, "a").held
    assert held.num_tokens == offered.num_tokens == offered.num_computed + moves.TOKENS_AHEAD - 1
    assert held.block_ids[: len(offered.block_ids)] == offered.block_ids
    assert len(held.block_ids) == -(-held.num_tokens // BLOCK)
    engine.scheduler.abort("a")
    engine.audit()


def test_without_an_offer_it_is_held_at_its_next_token() -> None:
    engine = Engine()
    engine.add("a", PROMPT, output=30)
    for _ in range(3):
        engine.step_with_outcome()
    engine.scheduler.move("a", offer=False)
    (held,) = run(engine, "a").held
    assert held.num_tokens == len(PROMPT) + 3


def test_guesses_do_not_carry_it_past_its_end() -> None:
    engine = Engine(model=cyclic, speculative=Speculative("ngram", 4))
    engine.add("a", PROMPT, output=40)
    for _ in range(12):
        engine.step_with_outcome()
    engine.scheduler.move("a", offer=True)
    (offered,) = run(engine, "a").progress
    (held,) = run(engine, "a").held
    assert held.num_tokens == offered.num_tokens


def test_one_that_nearly_ends_or_does_not_decode_stays() -> None:
    engine = Engine(tokens=4)
    engine.add("short", PROMPT, output=6)
    engine.add("waits", PROMPT * 4, output=30)
    engine.step_with_outcome()
    for name in ("short", "waits", "nobody"):
        engine.scheduler.move(name, offer=True)
    assert not any(sequence.hold for sequence in engine.scheduler.sequences.values())


def test_a_preempted_one_withdraws_and_is_held_later() -> None:
    engine = Engine()
    engine.add("a", PROMPT, output=30)
    for _ in range(4):
        engine.step_with_outcome()
    engine.scheduler.move("a", offer=True)
    assert run(engine, "a").progress
    sequence = engine.scheduler.sequences["a"]
    engine.scheduler._preempt(sequence, Batch(0))
    _, outcome = engine.step_with_outcome()
    assert [one.request_id for one in outcome.withdrawn] == ["a"]
    (held,) = run(engine, "a").held
    assert held.num_tokens == sequence.hold_at
    assert sequence.status is Status.HELD


def test_the_limit_of_blocks_for_peers_holds() -> None:
    engine = Engine(leased=4)
    for name in ("a", "b"):
        engine.add(name, PROMPT, output=30, salt=name)
    for _ in range(4):
        engine.step_with_outcome()
    for name in ("a", "b"):
        engine.scheduler.move(name, offer=True)
    assert [s.hold for s in engine.scheduler.sequences.values()] == [True, False]
