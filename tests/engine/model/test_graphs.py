"""Which decode steps are graphs, how they are filled up, and what makes an engine do without. Work is "recorded" on the
CPU by doing it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.attention import gather
from pdctl.engine.model.graphs import Graphs, GraphsRefused, batch_sizes
from pdctl.engine.model.inputs import InputBuffers, Inputs
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence
from tests.engine.model.test_loading import paged, reference, runner_for, save

SIZE, WIDTH, SCRATCH, VOCAB = 4, 6, 99, 7
CPU = torch.device("cpu")


class Again:
    """Repeats the work on the same memory."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()

        def replay() -> None:
            self.replays += 1
            work()

        return replay


class Frozen:
    """A recording with what was in the buffers when it was made."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return lambda: None


class Refusing:
    """As CUDA, where a model waits for the device."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when\nstream is capturing")


class Model:
    """Logits that depend on everything that a step's inputs hold."""

    def __init__(self) -> None:
        self.begun = 0
        self.seen: list[Inputs] = []

    def begin(self, inputs: Inputs) -> None:
        self.begun += 1
        self.seen.append(inputs)

    def compute(self, inputs: Inputs) -> torch.Tensor:
        batch = inputs.batch
        last = batch.table.gather(1, ((batch.lengths - 1) // SIZE)[:, None].long())[:, 0]
        mixed = inputs.ids + 3 * inputs.positions + 5 * batch.write_slots + 7 * batch.lengths + 11 * last
        return (mixed[inputs.keep, None] + torch.arange(VOCAB)).float()


def graphs_of(model: Model, sizes: list[int]) -> Graphs:
    return Graphs(InputBuffers(SIZE, CPU, is_static=True), sizes, WIDTH, SCRATCH, model.begin, model.compute)


def decoding(count: int, length: int = 9) -> list[Slice]:
    batch = []
    for index in range(count):
        blocks = [10 * index + n for n in range(-(-length // SIZE))]
        ids = [index + n for n in range(length)]
        batch.append(Slice(Sequence(f"{index}", ids, 1, Sampling(9), block_ids=blocks), length - 1, 1, True))
    return batch


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (16, [1, 2, 4, 8, 16]), (100, [1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 100])],
)
def test_sizes(most: int, sizes: list[int]) -> None:
    assert batch_sizes(most) == sizes


def logits_of(graphs: Graphs, batch: list[Slice]) -> torch.Tensor:
    staged = graphs.stage(batch)
    assert staged is not None
    return graphs.replay(staged)[: len(batch)]


def test_each_batch_is_what_the_model_computes_without_padding() -> None:
    model, recorder = Model(), Again()
    graphs = graphs_of(model, [1, 2, 4, 8])
    graphs.capture(recorder, 60)
    assert graphs.sizes == [1, 2, 4, 8]
    eager = InputBuffers(SIZE, CPU)
    for count in (3, 1, 8, 5, 2):
        before = recorder.replays
        batch = decoding(count, length=5 + count)
        found = logits_of(graphs, batch)
        assert recorder.replays == before + 1
        assert torch.equal(found, model.compute(eager.build(batch)))


def test_rows_that_are_left_write_to_the_block_of_nobody() -> None:
    model = Model()
    graphs = graphs_of(model, [4])
    graphs.capture(Again(), 60)
    logits_of(graphs, decoding(4, length=20))
    logits_of(graphs, decoding(1))
    inputs = model.seen[-1]
    assert inputs.batch.is_static
    assert inputs.batch.longest == WIDTH * SIZE
    assert inputs.batch.write_slots[1:].tolist() == [SCRATCH * SIZE] * 3
    assert inputs.batch.lengths.tolist() == [9, 1, 1, 1]
    assert inputs.batch.table[1:, 0].tolist() == [SCRATCH] * 3
    assert inputs.batch.starts.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "batch",
    [
        decoding(5),
        decoding(2, length=WIDTH * SIZE + 1),
        [*decoding(1), Slice(Sequence("p", [1, 2, 3], 3, Sampling(1), block_ids=[50]), 0, 3, True)],
        [Slice(Sequence("p", [1, 2, 3], 3, Sampling(1), block_ids=[50]), 0, 1, False)],
    ],
    ids=["too many", "too long", "a prompt", "the first token of a prompt"],
)
def test_other_batches_are_left_to_a_step_without_a_graph(batch: list[Slice]) -> None:
    graphs = graphs_of(Model(), [1, 4])
    recorder = Again()
    graphs.capture(recorder, 60)
    before = recorder.replays
    assert graphs.stage(batch) is None
    assert recorder.replays == before
    assert graphs.stage(decoding(2, length=WIDTH * SIZE)) is not None


def test_a_replay_that_does_not_see_new_inputs_is_refused() -> None:
    with pytest.raises(GraphsRefused, match="a replayed step of 4 differs by nan"):
        graphs_of(Model(), [1, 4]).capture(Frozen(), 60)


def test_a_model_that_cannot_be_captured_is_refused_with_the_reason() -> None:
    with pytest.raises(GraphsRefused, match="operation not permitted when stream is capturing"):
        graphs_of(Model(), [1, 4]).capture(Refusing(), 60)


def test_sizes_for_which_there_was_no_time_have_no_graph() -> None:
    graphs = graphs_of(Model(), [1, 4])
    graphs.capture(Again(), -1)
    assert graphs.sizes == []
    assert graphs.stage(decoding(1)) is None


def test_a_model_in_graphs_equals_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, mixed steps and graphs take turns. Freed blocks are NaN, those of nobody are not."""
    save("gemma3_text", tmp_path, {"sliding_window": 8})
    prompts = [[5, 9, 2], [7] * 20, [3, 1, 4, 1, 5]]
    runner = runner_for(tmp_path)
    # On the CPU, what `begin` prepares is recorded with the step: do it again.
    monkeypatch.setattr(gather.GatherBackend, "is_capturable", True)
    recorder = Again()
    last = runner.pool.num_blocks - 1
    assert runner.capture(4, 128, last, recorder) == [1, 2, 4]
    runner.pool.poison(list(range(last)))
    before = recorder.replays
    assert paged(runner, prompts, tokens=11, fragment=True) == reference(tmp_path, prompts)
    assert recorder.replays > before + 10


def test_a_backend_that_cannot_be_captured_is_said(tmp_path: Path) -> None:
    save("llama", tmp_path, {})
    runner = runner_for(tmp_path)
    with pytest.raises(GraphsRefused, match="attention by gather cannot be captured"):
        runner.capture(4, 128, 63, Again())
    assert paged(runner, [[1, 2, 3]], tokens=8, fragment=False) == reference(tmp_path, [[1, 2, 3]])
