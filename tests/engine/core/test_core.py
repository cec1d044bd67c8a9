"""The loop and its threads: what happens during a step, and what must wait for its end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.core.inbox import Inbox
from pdctl.engine.core.loop import Core, CoreEvent
from pdctl.engine.core.outbox import Outbox
from pdctl.engine.executor import Computed, Launched
from pdctl.engine.handover.puller import Puller
from pdctl.engine.ipc.messages import Abort, Reserve, Reserved, Sampling, Shutdown, StepDone, Submit
from pdctl.engine.model.grammar import Grammars
from pdctl.engine.schedule.batch import Limits, Slice
from pdctl.engine.schedule.scheduler import Scheduler

WAIT_S = 20.0


class SlowStep:
    def __init__(self, may_end: threading.Semaphore, token_ids: list[int]) -> None:
        self._may_end, self._token_ids = may_end, token_ids

    def finish(self) -> Computed:
        assert self._may_end.acquire(timeout=WAIT_S)
        return self._token_ids, [None] * len(self._token_ids)


class SlowExecutor:
    """Computes as long as the test wants. `token_of`: by request and the number of the step."""

    def __init__(self, token_of: Callable[[str, int], int]) -> None:
        self.began, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        self.blocks: list[set[int]] = []
        self.names: list[set[str]] = []
        self._token_of = token_of

    def publish(self, block_ids: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass

    def launch(self, batch: list[Slice], after: Launched | None = None) -> Launched:
        number = len(self.blocks)
        self.blocks.append({block for piece in batch for block in piece.sequence.block_ids})
        self.names.append({piece.sequence.request_id for piece in batch})
        self.began.release()
        names = [piece.sequence.request_id for piece in batch if piece.samples]
        return SlowStep(self.may_end, [self._token_of(name, number) for name in names])


class Puller_:
    def cancel(self, request_id: str) -> None:
        pass


class Said:
    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[object] = queue.SimpleQueue()

    def put(self, message: object) -> None:
        self.queue.put(message)

    def next(self) -> object:
        return self.queue.get(timeout=WAIT_S)


@contextmanager
def running(
    num_blocks: int = 16, ahead: bool = False, token_of: Callable[[str, int], int] = lambda name, number: 7
) -> Iterator[tuple[Core, SlowExecutor, Said]]:
    runner, said = SlowExecutor(token_of), Said()
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=64, block_size=4, max_model_len=64,
                    eos_token_ids=frozenset())  # fmt: skip
    inbox: Inbox[CoreEvent] = Inbox()
    core = Core(
        Scheduler(limits, BlockAllocator(num_blocks)), runner, Grammars(None, 8, frozenset()), cast(Puller, Puller_()),
        inbox, cast(Outbox, said), schedules_ahead=ahead,
    )  # fmt: skip
    loop = threading.Thread(target=core.run)
    loop.start()
    try:
        yield core, runner, said
    finally:
        core.receive(Shutdown())
        for _ in range(200):
            runner.may_end.release()
        loop.join(WAIT_S)
        assert not loop.is_alive()
        core.scheduler.audit()


def submit(name: str, tokens: int, kv_tokens: int = 0, sampling: Sampling | None = None) -> Submit:
    sampling = sampling or Sampling(max_tokens=2)
    return Submit(name, list(range(tokens)), tokens, sampling, kv_tokens=kv_tokens, await_kv=kv_tokens > 0)


def test_a_hand_over_gets_its_blocks_while_a_step_computes() -> None:
    with running() as (core, runner, said):
        core.receive(submit("a", 6))
        assert runner.began.acquire(timeout=WAIT_S)
        core.receive(submit("b", 9, kv_tokens=8))
        core.receive(Reserve("c", 5))
        # The step has not ended: only these messages are sent.
        reserved = [said.next(), said.next()]
        assert [(type(r), r.request_id) for r in reserved] == [(Reserved, "b"), (Reserved, "c")]  # type: ignore[attr-defined]
        for found in reserved:
            assert isinstance(found, Reserved)
            assert not runner.blocks[0] & set(found.block_ids), "blocks of the running batch are nobody else's"


def test_nothing_overtakes_and_nothing_is_freed_in_mid_step() -> None:
    with running(num_blocks=4) as (core, runner, said):
        core.receive(submit("a", 12))
        assert runner.began.acquire(timeout=WAIT_S)
        # The step uses the blocks of `a`: they are not freed before it ends, whatever messages arrive.
        core.receive(Abort("a"))
        core.receive(submit("b", 9, kv_tokens=8))
        with pytest.raises(queue.Empty):
            said.queue.get_nowait()  # messages are handled as they are received
        runner.may_end.release()
        first, second = said.next(), said.next()
        assert isinstance(first, StepDone)
        assert isinstance(second, Reserved)
        assert second.request_id == "b"


def test_the_duration_of_a_step_is_what_the_next_prompts_are_predicted_by() -> None:
    noted: list[tuple[int, float]] = []
    with running() as (core, runner, said):
        core.scheduler.took = lambda batch, seconds: noted.append((len(batch), seconds))  # type: ignore[method-assign]
        core.receive(submit("a", 12))
        assert runner.began.acquire(timeout=WAIT_S)
        runner.may_end.release()
        assert isinstance(said.next(), StepDone)
    assert noted[0][0] == 1
    assert noted[0][1] > 0


def test_what_does_not_fit_waits_for_the_step() -> None:
    with running(num_blocks=4) as (core, runner, said):
        core.receive(submit("a", 12))
        assert runner.began.acquire(timeout=WAIT_S)
        core.receive(submit("b", 9, kv_tokens=8))
        with pytest.raises(queue.Empty):
            said.queue.get_nowait()  # messages are handled as they are received
        core.receive(Abort("a"))
        runner.may_end.release()
        assert isinstance(said.next(), StepDone)
        assert isinstance(said.next(), Reserved)


@given(st.lists(st.integers(0, 9), max_size=30))
def test_the_inbox_keeps_order(numbers: list[int]) -> None:
    inbox: Inbox[int] = Inbox()
    for number in numbers:
        inbox.put(number)
    found = []
    while True:
        small = inbox.take_if(lambda number: number < 5)
        if small is not None:
            found.append(small)
            continue
        try:
            found.append(inbox.get())
        except queue.Empty:
            break
    assert found == numbers


def test_the_inbox_wakes_who_waits() -> None:
    inbox: Inbox[int] = Inbox()
    waits = threading.Event()

    class Told(threading.Condition):
        """Tells that somebody waits; the lock is theirs until they do."""

        def wait(self, timeout: float | None = None) -> bool:
            waits.set()
            return super().wait(timeout)

    def put() -> None:
        assert waits.wait(WAIT_S)
        inbox.put(3)

    inbox._arrived = Told()
    writer = threading.Thread(target=put)
    writer.start()
    assert inbox.get(timeout=WAIT_S) == 3
    writer.join()
    with pytest.raises(queue.Empty):
        inbox.get(timeout=0.01)
