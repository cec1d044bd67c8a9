"""Steps that are scheduled while one computes: when there is one, and that it changes nothing but the time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.engine.ipc.messages import Failed, Logprobs, Sampling, Token
from pdctl.engine.schedule import ahead
from pdctl.engine.schedule.batch import Outcome, Slice
from pdctl.engine.schedule.prompts.policies import POLICIES
from pdctl.engine.schedule.room import Room
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence, Status
from pdctl.speculative import Speculative
from tests.engine.schedule.engine import BLOCK, LONGEST, Engine, varied


def decoding(count: int = 2, blocks: int = 64, sampling: Sampling | None = None, **options: object) -> Engine:
    """An engine with sequences that decode."""
    engine = Engine(blocks, **options)  # type: ignore[arg-type]
    for number in range(count):
        engine.add_sampled(f"{number}", [number, 1, 2], sampling or Sampling(20))
    engine.step()
    assert len(engine.scheduler.running.decoding) == count
    return engine


def asked(engine: Engine, batch: list[Slice], is_quiet: bool = True) -> tuple[list[Slice], str]:
    """The step ahead of this one, and what came of it."""
    before = dict(engine.scheduler.ahead.asked)
    found = engine.scheduler.schedule_ahead(batch, is_quiet)
    [result] = [why for why, count in engine.scheduler.ahead.asked.items() if count > before.get(why, 0)]
    return found, result


def test_each_sequence_that_goes_on_gets_its_next_token() -> None:
    engine = decoding()
    batch = engine.scheduler.schedule()
    following, why = asked(engine, batch)
    assert why == ahead.LAUNCHED
    assert [(piece.sequence, piece.start, piece.count, piece.samples, piece.drafts) for piece in following] == [
        (piece.sequence, piece.start + 1, 1, True, ()) for piece in batch
    ]
    for piece in following:
        assert len(piece.sequence.block_ids) * BLOCK > piece.start


def test_a_sequence_with_its_last_token_is_left_out() -> None:
    engine = decoding(1, tokens=128)
    engine.add("short", [5, 6], output=2)
    engine.add("full", [7] * (LONGEST - 2), output=99)
    engine.step()
    batch = engine.scheduler.schedule()
    assert [piece.sequence.request_id for piece in batch] == ["0", "short", "full"]
    following, why = asked(engine, batch)
    assert (why, [piece.sequence.request_id for piece in following]) == (ahead.LAUNCHED, ["0"])


def _waiting_prompt(engine: Engine) -> None:
    engine.add("new", [8, 9])


def _seat_that_comes_free(engine: Engine) -> None:
    engine.add("2", [1], output=2)
    engine.add("3", [2], output=20)
    engine.step()
    engine.add("new", [8, 9])


def _partial_prompt(engine: Engine) -> None:
    engine.add("long", list(range(60)))
    engine.scheduler.update(batch := engine.scheduler.schedule(), [7 for piece in batch if piece.samples])


def _joined(engine: Engine) -> None:
    """A hand-over has arrived, as messages do between steps."""
    sequence = Sequence("h", [1, 2, 3, 4], 3, Sampling(5), kv_tokens=3, status=Status.AWAITING_BLOCKS)
    assert engine.scheduler.add(sequence) is None
    assert engine.scheduler.reserve() == [sequence]
    assert engine.scheduler.start("h")


def _no_blocks(engine: Engine) -> None:
    engine.scheduler.allocator.allocate("others", engine.scheduler.allocator.num_free)


@pytest.mark.parametrize(
    ("trouble", "why"),
    [(_waiting_prompt, ahead.PROMPTS), (_joined, ahead.BUDGET), (_no_blocks, ahead.BLOCKS)],
)
def test_what_may_change_the_next_step_prevents_it(trouble: Callable[[Engine], None], why: str) -> None:
    engine = decoding()
    # The next tokens need new blocks.
    while engine.scheduler.sequences["0"].num_computed % BLOCK != BLOCK - 1:
        engine.step()
    batch = engine.scheduler.schedule()
    trouble(engine)
    owned = {name: list(sequence.block_ids) for name, sequence in engine.scheduler.sequences.items()}
    assert asked(engine, batch) == ([], why)
    assert owned == {name: sequence.block_ids for name, sequence in engine.scheduler.sequences.items()}


@pytest.mark.parametrize("trouble", [_partial_prompt, _seat_that_comes_free])
def test_prompts_prevent_it(trouble: Callable[[Engine], None]) -> None:
    engine = decoding(tokens=16)
    trouble(engine)
    assert asked(engine, engine.scheduler.schedule()) == ([], ahead.PROMPTS)


def test_prompts_that_find_no_seat_do_not_prevent_it() -> None:
    engine = decoding(4)
    engine.add("new", [8, 9])
    following, why = asked(engine, engine.scheduler.schedule())
    assert (len(following), why) == (4, ahead.LAUNCHED)


def test_a_message_prevents_it() -> None:
    engine = decoding()
    assert asked(engine, engine.scheduler.schedule(), is_quiet=False) == ([], ahead.MESSAGES)


def test_guesses_prevent_it() -> None:
    engine = decoding(speculative=Speculative("ngram"))
    assert asked(engine, engine.scheduler.schedule()) == ([], ahead.GUESSES)


def test_the_end_of_all_prevents_it() -> None:
    engine = decoding(sampling=Sampling(2))
    assert asked(engine, engine.scheduler.schedule()) == ([], ahead.ENDS)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(9, logprobs=0),
        Sampling(9, prompt_logprobs=0),
        Sampling(9, presence_penalty=0.5),
        Sampling(9, frequency_penalty=0.5),
        Sampling(9, repetition_penalty=1.1),
        Sampling(9, min_tokens=3),
        Sampling(9, logit_bias={3: 1.0}),
        Sampling(9, bad_words=[[3, 4]]),
        Sampling(9, allowed_token_ids=[3, 4]),
        Sampling(9, grammar='{"regex": "a*"}'),
    ],
)
def test_tokens_that_depend_on_the_host_prevent_it(sampling: Sampling) -> None:
    engine = decoding(1)
    engine.add_sampled("shaped", [4, 5], sampling)
    engine.step()
    assert asked(engine, engine.scheduler.schedule()) == ([], ahead.SAMPLING)


def test_a_sequence_that_moves_prevents_it() -> None:
    engine = decoding()
    batch = engine.scheduler.schedule()
    engine.scheduler.move("0", offer=False)
    assert not engine.scheduler.sequences["0"].hold, "a step computes it"
    engine.scheduler.update(batch, [5, 6])
    engine.scheduler.move("0", offer=True)
    assert asked(engine, engine.scheduler.schedule()) == ([], ahead.HAND_OVERS)


@pytest.mark.parametrize("offer", [False, True])
def test_a_prefill_for_a_peer_prevents_it(offer: bool) -> None:
    engine = decoding(1)
    engine.add("held", [5], hold=not offer, offer=offer)
    assert asked(engine, engine.scheduler.schedule()) == ([], ahead.HAND_OVERS)


# -- what is computed once too often -----------------------------------------------------------------------


def two_in_flight(output: int = 20) -> tuple[Engine, list[Slice], list[Slice]]:
    engine = decoding(2, sampling=Sampling(output))
    batch = engine.scheduler.schedule()
    following = engine.scheduler.schedule_ahead(batch)
    assert following
    return engine, batch, following


def test_the_extra_token_of_an_ended_sequence_is_dropped_and_its_blocks_kept_until_then() -> None:
    engine, batch, following = two_in_flight()
    scheduler, ended = engine.scheduler, batch[0].sequence
    free = scheduler.allocator.num_free
    outcome = scheduler.update(batch, [99, 5])
    assert [(token.request_id, token.finish_reason) for token in outcome.tokens] == [("0", "stop"), ("1", None)]
    assert ended.status is Status.ENDED
    assert scheduler.allocator.owned("0") == ended.block_ids != []
    assert scheduler.allocator.num_free == free
    scheduler.audit()
    assert scheduler.books(0).running == 1
    third, why = asked(engine, following)
    assert (why, [piece.sequence.request_id for piece in third]) == (ahead.LAUNCHED, ["1"])
    outcome = scheduler.update(following, [6, 7])
    assert outcome.tokens == [Token("1", 7, None)]
    assert "0" not in scheduler.sequences
    assert scheduler.allocator.owned("0") == []
    scheduler.audit()
    assert scheduler.update(third, [8]).tokens == [Token("1", 8, None)]


def test_an_abort_waits_for_both_steps() -> None:
    engine, batch, following = two_in_flight()
    scheduler = engine.scheduler
    scheduler.abort("0")
    scheduler.abort("0")
    assert len(scheduler.running) == 1
    assert scheduler.update(batch, [99, 5]).tokens == [Token("1", 5, None)]
    assert scheduler.allocator.owned("0")
    scheduler.audit()
    assert scheduler.update(following, [6, 7]).tokens == [Token("1", 7, None)]
    assert not scheduler.allocator.owned("0")
    scheduler.audit()


def test_the_last_block_of_an_ended_sequence_is_not_found_by_others() -> None:
    """Its extra token fills a block, which has no name: nobody may find what nobody asked for."""
    engine = Engine()
    engine.add("0", [1, 2], output=20)
    engine.step()
    batch = engine.scheduler.schedule()
    following = engine.scheduler.schedule_ahead(batch)
    assert following[0].start == BLOCK - 1
    engine.scheduler.update(batch, [99])
    engine.scheduler.update(following, [5])
    assert engine.scheduler.allocator.names() == set()


def test_a_request_with_the_name_of_one_that_still_computes_is_refused() -> None:
    engine, batch, following = two_in_flight()
    engine.scheduler.update(batch, [99, 5])
    found = engine.scheduler.add(Sequence("0", [], 0, Sampling(1), kv_tokens=3, status=Status.AWAITING_BLOCKS))
    assert isinstance(found, Failed)
    engine.scheduler.update(following, [6, 7])
    engine.scheduler.audit()


# -- any load ----------------------------------------------------------------------------------------------


def answer(prompt: list[int], sampling: Sampling) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < sampling.max_tokens:
        tokens.append(varied(tuple(tokens)))
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(prompt) :]


class Load:
    """Random requests, some of them aborted, over a pool that may be too small for all."""

    def __init__(self, chance: random.Random, policy: str) -> None:
        self.chance = chance
        self.engine = Engine(
            chance.randint(12, 40), chance.choice((8, 16, 64)), chance.randint(1, 5), policy,
            shares=chance.random() < 0.7, segment=chance.choice((0, 0, BLOCK)), ahead=chance,
        )  # fmt: skip
        self.answers: dict[str, list[int]] = {}
        self.gone: set[str] = set()

    def add(self, name: str) -> None:
        chance = self.chance
        prompt = [chance.randint(0, 1), *range(chance.randint(0, 20))]
        stops = chance.sample(range(97), 8) if chance.random() < 0.7 else []
        sampling = Sampling(chance.randint(1, 20), stop_token_ids=stops, logprobs=chance.choice((-1, -1, -1, -1, 0)))
        self.answers[name] = answer(prompt, sampling)
        self.engine.add_sampled(name, prompt, sampling, priority=chance.randint(0, 1))

    def run(self) -> None:
        chance, engine = self.chance, self.engine
        for number in range(8):
            self.add(f"{number}")
            for _ in range(chance.choice((0, 1, 2, 10))):
                engine.step()
                if engine.scheduler.sequences and chance.random() < 0.05:
                    name = chance.choice(sorted(engine.scheduler.sequences))
                    self.gone.add(name)
                    engine.scheduler.abort(name)
                    engine.audit()
        engine.run()
        assert not engine.scheduler.sequences
        assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_blocks

    def check(self) -> None:
        for name, wanted in self.answers.items():
            found = self.engine.outputs.get(name, [])
            assert found == (wanted[: len(found)] if name in self.gone else wanted), name


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(sorted(POLICIES)))
def test_any_load_gives_the_tokens_of_a_request_alone(seed: int, policy: str) -> None:
    load = Load(random.Random(seed), policy)
    load.run()
    load.check()


def wander(seeds: range) -> dict[str, int]:
    """The same for many loads; how often a step was launched ahead, and why not."""
    results: dict[str, int] = {}
    for seed in seeds:
        load = Load(random.Random(seed), "fcfs")
        load.run()
        load.check()
        for why, count in load.engine.scheduler.ahead.asked.items():
            results[why] = results.get(why, 0) + count
    return results


def test_steps_are_launched_ahead_in_these_loads() -> None:
    results = wander(range(60))
    assert results[ahead.LAUNCHED] > 0.2 * sum(results.values()), results
    assert results.keys() >= {ahead.PROMPTS, ahead.SAMPLING, ahead.ENDS, ahead.BLOCKS, ahead.MESSAGES}


# -- deliberate faults -------------------------------------------------------------------------------------


def freed_a_step_early(patch: pytest.MonkeyPatch) -> None:
    """The blocks of an ended sequence are free while the step ahead still uses them."""

    def forget(self: Scheduler, sequence: Sequence) -> None:
        whole_forget(self, sequence)
        if sequence.status is Status.ENDED and sequence.block_ids:
            self._room.release(sequence)
            sequence.num_computed = 0

    whole_forget = Scheduler._forget
    patch.setattr(Scheduler, "_forget", forget)


def extra_token_sent(patch: pytest.MonkeyPatch) -> None:
    """What is computed once too often is sent as well."""

    def update(self: Scheduler, batch: list[Slice], token_ids: list[int], *told: list[Logprobs | None]) -> Outcome:
        extra = [
            Token(piece.sequence.request_id, token_id, None)
            for piece, token_id in zip(batch, token_ids, strict=False)
            if piece.sequence.status is Status.ENDED
        ]
        outcome = whole_update(self, batch, token_ids, *told)
        outcome.tokens.extend(extra)
        return outcome

    whole_update = Scheduler.update
    patch.setattr(Scheduler, "update", update)


def _same_place_twice(patch: pytest.MonkeyPatch) -> None:
    """The step ahead computes at the place of the step before it."""
    patch.setattr(ahead, "_known", lambda sequence: len(sequence.token_ids))


def _blocks_of_others(patch: pytest.MonkeyPatch) -> None:
    """The step ahead has no blocks of its own for its tokens."""
    patch.setattr(Room, "grow_all", lambda self, wanted: True)


@pytest.mark.parametrize(
    "fault",
    [freed_a_step_early, extra_token_sent, _same_place_twice, _blocks_of_others],
    ids=lambda fault: fault.__name__.strip("_"),
)
def test_a_fault_is_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        wander(range(60))
