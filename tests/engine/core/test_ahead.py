"""The loop with the next step launched while one computes: what it waits for, and that no token changes."""

from __future__ import annotations

import os
import queue
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
from msgspec import structs

from pdctl.engine.cache import prefix
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.core.inbox import Inbox
from pdctl.engine.core.loop import Core, CoreEvent
from pdctl.engine.core.outbox import Outbox
from pdctl.engine.executor.single import POISON_ENV, SingleExecutor
from pdctl.engine.handover.puller import Puller
from pdctl.engine.ipc.messages import (
    Abort,
    Books,
    Poke,
    Pulled,
    Reserve,
    Reserved,
    Sampling,
    Shutdown,
    Start,
    StepDone,
    Submit,
)
from pdctl.engine.options import parse
from pdctl.engine.schedule.ahead import LAUNCHED
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.scheduler import Scheduler
from tests.engine.core.test_core import WAIT_S, Puller_, Said, SlowExecutor, running, submit

TEN = Sampling(max_tokens=10)


def step(said: Said) -> StepDone:
    found = said.next()
    assert isinstance(found, StepDone)
    return found


def decoding(core: Core, runner: SlowExecutor, said: Said, sampling: Sampling, tokens: int = 6) -> None:
    """A sequence `a` whose prompt is computed: a step of it computes, and the next one is launched."""
    core.receive(submit("a", tokens, sampling=sampling))
    assert runner.began.acquire(timeout=WAIT_S)
    runner.may_end.release()
    step(said)
    assert runner.began.acquire(timeout=WAIT_S)
    assert runner.began.acquire(timeout=WAIT_S)


def test_the_next_step_is_launched_before_the_results_of_the_one_that_computes() -> None:
    with running(ahead=True) as (core, runner, said):
        decoding(core, runner, said, TEN)
        assert said.queue.empty()
        runner.may_end.release()
        assert [token.request_id for token in step(said).tokens] == ["a"]
        assert runner.began.acquire(timeout=WAIT_S)
        assert runner.names == [{"a"}] * 4


def test_it_is_not_launched_unless_it_is_wanted() -> None:
    with running() as (core, runner, said):
        core.receive(submit("a", 6, sampling=TEN))
        for _ in range(3):
            assert runner.began.acquire(timeout=WAIT_S)
            assert not runner.began.acquire(blocking=False)
            runner.may_end.release()
            step(said)


def test_a_message_is_handled_when_both_steps_have_ended() -> None:
    with running(ahead=True) as (core, runner, said):
        decoding(core, runner, said, TEN)
        core.receive(submit("b", 3, sampling=TEN))
        runner.may_end.release()
        step(said)
        assert not runner.began.acquire(blocking=False)
        runner.may_end.release()
        assert step(said).books.waiting == 0, "it is not even queued before"
        assert runner.began.acquire(timeout=WAIT_S)
        assert runner.names[-2:] == [{"a"}, {"a", "b"}]


def test_an_abort_leaves_the_blocks_until_both_steps_have_ended() -> None:
    with running(ahead=True) as (core, runner, said):
        decoding(core, runner, said, TEN)
        core.receive(Abort("a"))
        for _ in range(2):
            runner.may_end.release()
            assert step(said).books.blocks_referenced > 0
        assert step(said).books.blocks_free == 16


def test_blocks_of_an_ended_sequence_are_reserved_for_nobody_before_the_step_ahead_has_ended() -> None:
    """Its second step yields a stop token. A hand-over that arrives then gets its blocks only after the third one."""
    stopping = structs.replace(TEN, stop_token_ids=[9])
    with running(4, ahead=True, token_of=lambda name, number: 9 if number == 1 else 7) as (core, runner, said):
        decoding(core, runner, said, stopping)
        runner.may_end.release()
        done = step(said)
        assert [token.finish_reason for token in done.tokens] == ["stop"]
        assert done.books.running == 0
        used = runner.blocks[2]
        core.receive(Reserve("h", 12))
        with pytest.raises(queue.Empty):
            said.queue.get_nowait()  # messages are handled as they are received
        runner.may_end.release()
        assert step(said).tokens == []
        reserved = said.next()
        assert isinstance(reserved, Reserved)
        assert used & set(reserved.block_ids)


def test_a_hand_over_gets_free_blocks_while_two_steps_are_in_flight() -> None:
    with running(ahead=True) as (core, runner, said):
        decoding(core, runner, said, TEN)
        core.receive(Reserve("h", 8))
        reserved = said.next()
        assert isinstance(reserved, Reserved)
        assert not set(reserved.block_ids) & (runner.blocks[1] | runner.blocks[2])


def test_the_end_of_a_transfer_does_not_stop_steps_ahead() -> None:
    """It only concerns blocks that no step uses. The commit, which lets its sequence join, does."""
    with running(ahead=True) as (core, runner, said):
        decoding(core, runner, said, TEN)
        core.receive(submit("h", 9, kv_tokens=8, sampling=TEN))
        assert isinstance(said.next(), Reserved)
        assert core.scheduler.pull_started("h")
        core.inbox.put(Pulled("h", "", 0.1, 100))
        runner.may_end.release()
        step(said)
        assert runner.began.acquire(timeout=WAIT_S)
        core.receive(Start("h"))
        for _ in range(2):
            runner.may_end.release()
            step(said)
        assert runner.began.acquire(timeout=WAIT_S)
        assert runner.names[:5] == [{"a"}] * 4 + [{"a", "h"}]


def test_every_step_is_timed_once() -> None:
    noted: list[tuple[int, float]] = []
    with running(ahead=True) as (core, runner, said):
        core.scheduler.took = lambda batch, seconds: noted.append((len(batch), seconds))  # type: ignore[method-assign]
        decoding(core, runner, said, structs.replace(TEN, max_tokens=4))
        for _ in range(3):
            runner.may_end.release()
            step(said)
    assert [count for count, _ in noted] == [1] * 4
    assert all(seconds > 0 for _, seconds in noted)


# -- a model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["ahead", "one by one"])
def engine(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[SingleExecutor, bool]]:
    """An executor, and whether it launches steps ahead. Freed blocks are NaN."""
    folder = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, POISON_ENV, "1")
        executor = SingleExecutor.load(parse([
            "--name", "e", "--model", str(tiny_model), "--port", "1", "--run-dir", str(folder), "--epoch", "e1",
            "--block-size", "4", "--kv-cache-gb", "0.01", "--schedule-ahead", str(request.param).lower(),
        ]))  # fmt: skip
    yield executor, request.param
    executor.close()


BLOCKS = 40


@contextmanager
def serving(engine: tuple[SingleExecutor, bool]) -> Iterator[tuple[Core, Said]]:
    executor, is_ahead = engine
    assert executor.num_blocks >= BLOCKS
    limits = Limits(4, 16, 60, 4, frozenset({3}))
    allocator = BlockAllocator(BLOCKS, executor.poison)
    scheduler = Scheduler(limits, allocator, root=prefix.root(executor.manifest))
    inbox: Inbox[CoreEvent] = Inbox()
    said = Said()
    core = Core(
        scheduler, executor, executor.grammars, cast(Puller, Puller_()), inbox, cast(Outbox, said),
        schedules_ahead=is_ahead,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        loop = pool.submit(core.run)
        try:
            yield core, said
        finally:
            core.receive(Shutdown())
            loop.result(WAIT_S)
            scheduler.audit()


def requests(seed: int) -> list[Submit]:
    chance = random.Random(seed)
    made = []
    for number in range(16):
        prompt = [chance.choice((5, 6)), *(chance.randrange(4, 250) for _ in range(chance.choice((1, 8, 25))))]
        sampling = Sampling(
            chance.choice((2, 12, 30)), chance.choice((0.0, 1.0)), seed=chance.randrange(2**32),
            stop_token_ids=chance.sample(range(4, 250), 6), ignore_eos=chance.random() < 0.2,
            logprobs=1 if chance.random() < 0.1 else -1, frequency_penalty=0.5 if chance.random() < 0.1 else 0.0,
        )  # fmt: skip
        made.append(Submit(f"{number}", prompt, len(prompt), sampling, hold=chance.random() < 0.2))
    return made


class Front:
    """What the front does: sends requests as seats come free, aborts some, frees what is held."""

    def __init__(self, core: Core, said: Said, seed: int) -> None:
        self.core, self.said = core, said
        self.chance = random.Random(seed)
        self.outputs: dict[str, list[int]] = {}
        self.open: set[str] = set()
        self.aborted: set[str] = set()
        self.books = Books()

    def run(self, wanted: list[Submit]) -> None:
        left = list(wanted)
        while left or self.open:
            while left and (not self.open or self.chance.random() < 0.15):
                request = left.pop(0)
                self.open.add(request.request_id)
                # As if it was decoded: the core adds to its tokens.
                self.core.receive(structs.replace(request, token_ids=list(request.token_ids)))
            self.take(self.said.next())
            if self.open and self.chance.random() < 0.02:
                name = self.chance.choice(sorted(self.open))
                self.aborted.add(name)
                self.open.discard(name)
                self.core.receive(Abort(name))
        while self.books.blocks_free < BLOCKS:
            self.core.receive(Poke())
            self.take(self.said.next())

    def take(self, message: object) -> None:
        assert isinstance(message, StepDone), message
        assert not message.failed
        self.books = message.books
        for token in message.tokens:
            self.outputs.setdefault(token.request_id, []).append(token.token_id)
            if token.finish_reason is not None:
                self.open.discard(token.request_id)
        for held in message.held:
            self.outputs[held.request_id] = [held.token_id]
            self.open.discard(held.request_id)
            self.core.receive(Abort(held.request_id))


@pytest.mark.parametrize("seed", range(4))
def test_a_request_gets_the_tokens_that_it_gets_alone(engine: tuple[SingleExecutor, bool], seed: int) -> None:
    wanted = requests(seed)
    with serving(engine) as (core, said):
        alone = Front(core, said, seed)
        for request in wanted:
            alone.chance = random.Random(1)  # which aborts nothing while one is open at a time
            alone.run([request])
    with serving(engine) as (core, said):
        together = Front(core, said, seed)
        together.run(wanted)
    # How many depends on when the messages arrive.
    assert (together.books.asked_ahead.get(LAUNCHED, 0) > 0) == engine[1]
    for request in wanted:
        name = request.request_id
        found, expected = together.outputs.get(name, []), alone.outputs.get(name, [])
        if name in together.aborted | alone.aborted:
            length = min(len(found), len(expected))
            assert found[:length] == expected[:length], name
        else:
            assert found == expected, name
