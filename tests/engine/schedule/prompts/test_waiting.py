from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.prompts.policies import POLICIES, Prompt
from pdctl.engine.schedule.prompts.waiting import Rank, WaitingQueue
from pdctl.engine.schedule.sequence import Sequence


class QueueMachine(RuleBasedStateMachine):
    """The heaps against a list that is sorted anew each time."""

    policy = "edf"

    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue(POLICIES[self.policy])
        self.model: dict[str, tuple[Sequence, Prompt]] = {}
        self.now = 0.0
        self.number = 0

    @rule(
        work=st.floats(0, 20), ttft=st.floats(0, 30), priority=st.integers(-1, 1), preempted=st.booleans(),
    )  # fmt: skip
    def push(self, work: float, ttft: float, priority: int, preempted: bool) -> None:
        self.number += 1
        sequence = Sequence(str(self.number), [1], 1, Sampling(1), priority=priority, arrival=self.number)
        sequence.preemptions = int(preempted)
        prompt = Prompt(self.now, work, work, self.now + ttft)
        self.queue.push(sequence, prompt)
        self.model[sequence.request_id] = sequence, prompt

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.queue.remove(self.model.pop(name)[0])

    @precondition(lambda self: self.model)
    @rule()
    def take_first_and_return_it_preempted(self) -> None:
        sequence = self.queue.head(self.now)
        assert sequence is not None
        self.queue.remove(sequence)
        sequence.preemptions += 1
        self.queue.push(sequence, self.model[sequence.request_id][1])
        self.model[sequence.request_id] = self.model.pop(sequence.request_id)

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_first_is_the_smallest(self) -> None:
        def order(found: tuple[Sequence, Prompt]) -> tuple[int, int, float, int]:
            sequence, prompt = found
            rank = Rank.NORMAL
            if sequence.preemptions:
                rank = Rank.URGENT
            elif POLICIES[self.policy].late_from(prompt) <= self.now:
                rank = Rank.LATE
            return rank, sequence.priority, POLICIES[self.policy].key(prompt), sequence.arrival

        first = min(self.model.values(), key=order, default=None)
        assert self.queue.head(self.now) is (first and first[0])
        assert len(self.queue) == len(self.model)
        # Who is returned goes to the end of the model as well.
        queued_first = next(iter(self.model.values()), None)
        assert self.queue.longest_waiting() is (queued_first and queued_first[0])
        assert len(self.queue._heap) + len(self.queue._changes) <= 6 * len(self.queue) + 72, "stale items pile up"


class ShortestFirst(QueueMachine):
    policy = "sjf"


TestEarliestDeadline = QueueMachine.TestCase
TestShortestFirst = ShortestFirst.TestCase
for case in (TestEarliestDeadline, TestShortestFirst):
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
