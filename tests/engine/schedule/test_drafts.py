"""Guessed tokens: they change how fast a sequence gets on, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.engine import speculation
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.drafts import accepted
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.prompts.policies import POLICIES
from pdctl.engine.schedule.sequence import Status
from pdctl.latency import StepTimes
from pdctl.speculative import Speculative
from tests.engine.schedule.engine import BLOCK, EOS, Engine, cyclic, varied

NGRAM = Speculative("ngram")


class Guesser:
    """Guesses right for `right` tokens, then wrong."""

    def __init__(self, model: Callable[[tuple[int, ...]], int], right: Callable[[], int]) -> None:
        self.model = model
        self.right = right

    def draft(self, token_ids: Sequence[int], most: int) -> list[int]:
        found, right = list(token_ids), self.right()
        for index in range(most):
            found.append(self.model(tuple(found)) + (index >= right))
        return found[len(token_ids) :]


@pytest.fixture
def guesses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """An engine whose guesses are right for so many tokens of four."""

    def engine(right: int, blocks: int = 64) -> Engine:
        monkeypatch.setitem(speculation._KINDS, "test", lambda settings: Guesser(varied, lambda: right))
        return Engine(blocks, speculative=Speculative("test"))

    return engine


def plain(prompt: list[int], sampling: Sampling, model: Callable[[tuple[int, ...]], int] = varied) -> Engine:
    engine = Engine(model=model)
    engine.add_sampled("a", prompt, sampling)
    engine.run()
    return engine


@pytest.mark.parametrize("right", [0, 1, 3, 4])
def test_only_what_would_have_been_sampled_is_taken(guesses: Callable[..., Engine], right: int) -> None:
    engine = guesses(right)
    engine.add("a", list(range(6)), output=20)
    engine.run()
    assert engine.outputs == plain(list(range(6)), Sampling(20)).outputs
    # The first guess is made for the second token, the last for the one before the last.
    assert engine.steps == {0: 20, 4: 5}.get(right, engine.steps)
    books = engine.scheduler.books(0)
    assert books.accepted == 20 - engine.steps
    assert books.drafted >= books.accepted
    assert engine.scheduler.allocator.num_free == 64


def costly(row_s: float) -> LatencyModel:
    """A model of steps of 10 ms, and so many seconds for each sequence."""
    latency = LatencyModel()
    latency.times = StepTimes((0.01, 0.0, 0.0, row_s, 0.0))
    latency.is_fitted = True
    return latency


@pytest.mark.parametrize(("row_s", "made"), [(0.0, 4), (1e-4, 4), (2e-3, 2), (3e-3, 1), (1e-2, 0)])
def test_guesses_are_made_as_far_as_they_pay(guesses: Callable[..., Engine], row_s: float, made: int) -> None:
    """At first, half of them are expected to be right. One sequence: (10 ms + row) bring a token."""
    engine = guesses(4)
    engine.scheduler.latency = costly(row_s)
    engine.add("a", list(range(6)), output=30)
    engine.step()
    assert [len(piece.drafts) for piece in engine.step()] == [made]


@pytest.mark.parametrize(("right", "before", "after"), [(4, 0, 4), (0, 1, 0)])
def test_guesses_are_judged_even_if_they_are_not_verified(
    guesses: Callable[..., Engine], right: int, before: int, after: int
) -> None:
    engine = guesses(right)
    engine.scheduler.latency = costly(5e-3 if right else 2e-3)
    engine.add("a", list(range(6)), output=40)
    engine.add("b", list(range(6)), output=40)
    engine.add("c", list(range(6)), output=40)
    engine.step()
    made = [max(len(piece.drafts) for piece in engine.step()) for _ in range(10)]
    assert (made[0], made[-1]) == (before, after)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(9),
        Sampling(9, stop_token_ids=[plain([1, 2, 3], Sampling(9)).outputs["a"][4]]),
        Sampling(9, stop_token_ids=[plain([1, 2, 3], Sampling(9)).outputs["a"][4]], min_tokens=6),
        Sampling(100),
    ],
)
def test_an_output_ends_inside_a_run_where_it_would_without(
    guesses: Callable[..., Engine], sampling: Sampling
) -> None:
    expected = plain([1, 2, 3], sampling)
    engine = guesses(4)
    engine.add_sampled("a", [1, 2, 3], sampling)
    engine.run()
    assert (engine.outputs, engine.reasons) == (expected.outputs, expected.reasons)
    assert engine.steps < expected.steps
    assert engine.scheduler.allocator.num_free == 64


def test_the_end_token_ends_a_run(guesses: Callable[..., Engine]) -> None:
    engine = guesses(4)
    engine.model = lambda tokens: EOS if len(tokens) == 7 else varied(tokens)
    engine.add("a", [1, 2, 3], output=20)
    engine.run()
    assert engine.outputs["a"][-1] == EOS
    assert len(engine.outputs["a"]) == 5
    assert engine.reasons == {"a": "stop"}


def test_rejected_tokens_are_in_no_named_block(guesses: Callable[..., Engine]) -> None:
    """Their KV is there for a while; a later prompt with just these tokens must not find it."""
    engine = guesses(0)
    prompt = list(range(2 * BLOCK - 2))
    engine.add("a", prompt, output=2)
    [piece] = engine.step()
    assert not piece.drafts, "a prompt is not guessed"
    engine.add("b", prompt, output=9)
    for _ in range(3):
        engine.step()
    wrong = [*prompt, varied(tuple(prompt)), varied((*prompt, varied(tuple(prompt)))) + 1]
    engine.add("c", [*wrong, 7, 7], output=1)
    engine.run()
    assert engine.cached["c"] == BLOCK


def test_blocks_of_rejected_guesses_are_given_back(guesses: Callable[..., Engine]) -> None:
    engine = guesses(0)
    engine.add("a", list(range(BLOCK)), output=20)
    engine.step()
    before = engine.scheduler.allocator.num_free
    [piece] = engine.step()
    assert len(piece.drafts) == 4
    assert engine.scheduler.allocator.num_free == before - 1
    assert len(piece.sequence.block_ids) == 2


@pytest.mark.parametrize(("tokens", "made"), [(64, 4), (4, 3), (1, 0)])
def test_guesses_take_what_is_left_of_the_budget(guesses: Callable[..., Engine], tokens: int, made: int) -> None:
    engine = guesses(4)
    engine.add("a", [1], output=20)
    engine.step()
    engine.scheduler.limits = replace(engine.scheduler.limits, max_num_batched_tokens=tokens)
    assert [len(piece.drafts) for piece in engine.step()] == [made]


def test_prompts_get_blocks_before_guesses(guesses: Callable[..., Engine]) -> None:
    engine = guesses(4, blocks=2)
    engine.add("a", [1, 2], output=6)
    engine.step()
    engine.add("b", [1, 2, 3], output=1)
    first, second = engine.scheduler.schedule()
    assert (first.sequence.request_id, len(first.drafts)) == ("a", 1), "as many as its own block holds"
    assert (second.sequence.request_id, second.count) == ("b", 3)
    assert first.sequence.preemptions == 0


def test_what_a_peer_or_a_grammar_waits_for_is_not_guessed(guesses: Callable[..., Engine]) -> None:
    engine = guesses(4)
    engine.add("held", list(range(5)), output=9, hold=True)
    engine.add_sampled("guided", list(range(5)), Sampling(4, grammar="g"))
    while engine.scheduler.has_work:
        assert not any(piece.drafts for piece in engine.step())
    assert engine.scheduler.sequences["held"].status is Status.HELD


def test_without_the_setting_nothing_is_guessed() -> None:
    engine = Engine(model=cyclic)
    engine.add("a", [1, 2, 1, 2, 1], output=30)
    while engine.scheduler.has_work:
        assert not any(piece.drafts for piece in engine.step())
    assert engine.scheduler.books(0).drafted == 0


def test_a_repeating_answer_needs_fewer_steps() -> None:
    engine = Engine(model=cyclic, speculative=NGRAM)
    engine.add("a", [1, 2, 3], output=40)
    engine.run()
    expected = plain([1, 2, 3], Sampling(40), cyclic)
    assert engine.outputs == expected.outputs
    assert engine.steps < 0.6 * expected.steps


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_a_guess_is_right_if_all_before_it_were_sampled(drafts: list[int], sampled: list[int]) -> None:
    found = [token for token, _ in accepted(drafts, [(token, None) for token in sampled[: len(drafts) + 1]])]
    right = 0
    while right < len(drafts) and drafts[right] == sampled[right]:
        right += 1
    assert found == sampled[: right + 1]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=10),
    st.integers(14, 40), st.integers(1, 5), st.integers(4, 40), st.sampled_from(sorted(POLICIES)),
    st.sampled_from(["ngram", "chance"]), st.integers(1, 9), st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
def test_a_guess_never_changes_a_token(
    wanted: list[tuple[int, int, int]], blocks: int, seqs: int, tokens: int, policy: str, kind: str, most: int,
    shares: bool, chance: random.Random,
) -> None:  # fmt: skip
    """For any requests, pools, budgets, policies, arrivals, aborts, preemptions, and guesses that are right or wrong by
    chance. Every block that a sequence reads holds the KV of exactly its own tokens."""
    model = cyclic if kind == "ngram" else varied
    alone = Engine(shares=False, model=model)
    asked = [([family, *range(length)], output) for family, length, output in wanted]
    for number, (prompt, output) in enumerate(asked):
        alone.add(str(number), prompt, output)
        alone.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            speculation._KINDS, "chance", lambda settings: Guesser(model, lambda: chance.randint(0, settings.tokens))
        )
        engine = Engine(blocks, tokens, seqs, policy, shares, model=model, speculative=Speculative(kind, most))
        aborted = set()
        for number, (prompt, output) in enumerate(asked):
            engine.add(str(number), prompt, output, priority=chance.randint(0, 1))
            for _ in range(chance.randint(0, 4)):
                engine.step()
            if chance.random() < 0.15:
                victim = str(chance.randint(0, number))
                aborted.add(victim)
                engine.scheduler.abort(victim)
                engine.scheduler.audit()
        engine.run()
    for name, expected in alone.outputs.items():
        found = engine.outputs.get(name, [])
        assert found == (expected[: len(found)] if name in aborted else expected)
    assert engine.scheduler.allocator.num_free == blocks
