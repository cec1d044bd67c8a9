"""An engine over several processes: the tokens of one process, and what follows when a rank ends or stands still."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from pdctl.engine.executor import microbatches, ranks
from pdctl.engine.executor.ranks import RanksExecutor
from pdctl.engine.executor.single import POISON_ENV, SingleExecutor
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.loading import ModelRefused
from pdctl.engine.model.parallel import RankLost
from pdctl.engine.options import EngineOptions, parse
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence
from pdctl.wire import Part

Lost = queue.SimpleQueue[tuple[str, bool]]
TOKENS = 12
PROMPT = [(index * 37 + 11) % 300 + 3 for index in range(40)]


def options(model: Path, folder: Path, ranks: int, stages: int = 1, stripes: int = 1) -> EngineOptions:
    return parse([
        "--name", "e", "--model", str(model), "--port", "1", "--run-dir", str(folder), "--epoch", "e1",
        "--kv-cache-gb", "0.01", "--dtype", "float32", "--tensor-parallel", str(ranks),
        "--pipeline-parallel", str(stages), "--sequence-parallel", str(stripes),
    ])  # fmt: skip


@contextmanager
def started(
    model: Path, folder: Path, ranks: int, step_s: float = 60.0, stages: int = 1, stripes: int = 1
) -> Iterator[tuple[RanksExecutor, Lost]]:
    lost: Lost = queue.SimpleQueue()
    given = options(model, folder, ranks, stages, stripes)
    executor = RanksExecutor.load_ranks(given, lambda *end: lost.put(end), step_s)
    pids = executor.others.pids
    try:
        yield executor, lost
    finally:
        executor.others.kill()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.fixture
def torn_group() -> None:
    """For a test that loses a rank: gloo keeps a listening socket until the process ends, as an engine's then does."""


def answer(executor: SingleExecutor, sampling: Sampling, chunk: int = 16) -> list[int]:
    """A prompt in chunks, in scattered blocks, then decode steps."""
    sequence = Sequence("r", list(PROMPT), len(PROMPT), sampling, block_ids=[7, 2, 5, 9])
    for start in range(0, len(PROMPT), chunk):
        count = min(chunk, len(PROMPT) - start)
        tokens, _ = executor.execute([Slice(sequence, start, count, start + count == len(PROMPT))])
    while True:
        sequence.token_ids += tokens
        if sequence.num_output == TOKENS:
            return sequence.token_ids[len(PROMPT) :]
        tokens, _ = executor.execute([Slice(sequence, len(sequence.token_ids) - 1, 1, True)])


def count_parts(executor: RanksExecutor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each microbatch before the last ones of steps."""
    found, advance = list[int](), executor._runner.advance

    def counted(batch: list[Slice]) -> None:
        found.append(sum(piece.num_rows for piece in batch))
        advance(batch)

    monkeypatch.setattr(executor._runner, "advance", counted)
    return found


SAMPLINGS = [
    Sampling(TOKENS, temperature=0.0),
    Sampling(TOKENS, temperature=1.0, seed=3),
    Sampling(TOKENS, temperature=0.8, seed=4, top_p=0.9, presence_penalty=0.5, logprobs=2),
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_answer_as_one_process_does(ranks: int, tiny_model: Path, tmp_path: Path) -> None:
    single = SingleExecutor.load(options(tiny_model, tmp_path, 1))
    expected = [answer(single, sampling) for sampling in SAMPLINGS]
    assert all(len(set(tokens)) >= 5 for tokens in expected), "an output without variety proves little"
    single.close()
    with started(tiny_model, tmp_path, ranks) as (executor, lost):
        assert [answer(executor, sampling) for sampling in SAMPLINGS] == expected
        assert [shard.part for shard in executor.shards] == [Part(rank, ranks) for rank in range(ranks)]
        heads = {pool.keys[0].shape[1] for pool in executor.pools}
        assert heads == {1}, "of two: one each, which two of four ranks have"
        pids = executor.others.pids
        executor.close()
        assert not any(psutil.pid_exists(pid) for pid in pids), "they left"
        assert lost.empty()
    assert list(tmp_path.iterdir()) == [], "nothing is left of the meeting"


@pytest.mark.parametrize(("ranks", "fewest"), [(1, 128), (1, 5), (2, 5)])
def test_stages_answer_as_one_process_does(
    ranks: int, fewest: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole chunks, or three microbatches of each."""
    monkeypatch.setattr(microbatches, "_FEWEST_ROWS", fewest)
    single = SingleExecutor.load(options(tiny_model, tmp_path, 1))
    expected = [answer(single, sampling) for sampling in SAMPLINGS]
    single.close()
    with started(tiny_model, tmp_path, ranks, stages=2) as (executor, lost):
        parts = count_parts(executor, monkeypatch)
        assert [answer(executor, sampling) for sampling in SAMPLINGS] == expected
        assert bool(parts) == (fewest < 16), "chunks of 16 rows"
        assert executor.manifest == single.manifest
        layers = [len(pool.keys) for pool in executor.pools]
        assert sum(layers) == ranks * len(single.manifest.layers)
        places = [(shard.part.first_layer, shard.part.layers, shard.part.rank) for shard in executor.shards]
        each = len(single.manifest.layers) // 2
        assert places == [(first, each, rank) for first in (0, each) for rank in range(ranks)]
        executor.close()
        assert lost.empty()


@pytest.mark.parametrize("stripes", [2, 3])
def test_stripes_answer_as_one_process_does(stripes: int, tiny_model: Path, tmp_path: Path) -> None:
    single = SingleExecutor.load(options(tiny_model, tmp_path, 1))
    expected = [answer(single, sampling, chunk=25) for sampling in SAMPLINGS]
    kept = [plane.clone() for plane in (*single.pool.keys, *single.pool.values)]
    single.close()
    with started(tiny_model, tmp_path, 1, stripes=stripes) as (executor, lost):
        assert [answer(executor, sampling, chunk=25) for sampling in SAMPLINGS] == expected
        assert [shard.part for shard in executor.shards] == [Part()] * stripes
        used = [block * 16 + at for block in (7, 2, 5, 9) for at in range(16)][: len(PROMPT) + TOKENS - 1]
        for pool in executor.pools:
            for plane, wanted in zip((*pool.keys, *pool.values), kept, strict=True):
                assert torch.allclose(plane[used], wanted[used], atol=1e-5), "every rank has all KV"
        executor.close()
        assert lost.empty()


def test_freed_blocks_are_poisoned_on_every_rank(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POISON_ENV, "1")
    with started(tiny_model, tmp_path, 2) as (executor, _):
        assert executor.poison is not None
        answer(executor, SAMPLINGS[0])
        executor.poison([7])
        assert all(bool(pool.keys[0][7 * 16].isnan().all()) for pool in executor.pools)
        executor.close()


@pytest.mark.parametrize(
    ("ranks", "shape"), [(2, {}), (1, {"stages": 2}), (1, {"stripes": 2})], ids=["ranks", "stages", "stripes"]
)
def test_a_rank_that_is_killed_ends_the_steps_with_its_reason(
    ranks: int, shape: dict[str, int], tiny_model: Path, tmp_path: Path, torn_group: None
) -> None:
    with started(tiny_model, tmp_path, ranks, **shape) as (executor, lost):
        answer(executor, SAMPLINGS[0])
        os.kill(executor.others.pids[0], signal.SIGKILL)
        assert lost.get(timeout=60) == ("rank 1 was killed by SIGKILL", False)
        with pytest.raises(RankLost):
            answer(executor, SAMPLINGS[0])


@pytest.mark.parametrize(
    ("ranks", "shape"), [(2, {}), (1, {"stages": 2}), (1, {"stripes": 2})], ids=["ranks", "stages", "stripes"]
)
def test_a_rank_that_stands_still_is_given_up(
    ranks: int, shape: dict[str, int], tiny_model: Path, tmp_path: Path, torn_group: None
) -> None:
    with started(tiny_model, tmp_path, ranks, **shape, step_s=15.0) as (executor, lost):
        answer(executor, SAMPLINGS[0])
        os.kill(executor.others.pids[0], signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(RankLost, match="a rank did not take part in a step within 15 s"):
            answer(executor, SAMPLINGS[0])
        assert time.monotonic() - began < 120
        assert lost.empty(), "it has not ended"


def test_a_rank_that_refuses_the_model_says_why(tiny_model: Path, tmp_path: Path) -> None:
    lost: Lost = queue.SimpleQueue()
    with pytest.raises(ModelRefused, match="8 attention heads and 2 KV heads cannot be shared by 3 ranks"):
        RanksExecutor.load_ranks(options(tiny_model, tmp_path, 3), lambda *end: lost.put(end))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


_DIES = """
import os, signal, sys
from pathlib import Path
from pdctl.engine.executor.ranks import RanksExecutor
from tests.engine.executor.test_ranks import options
executor = RanksExecutor.load_ranks(options(Path(sys.argv[1]), Path(sys.argv[2]), 2), print)
print(*executor.others.pids, flush=True)
sys.stdin.read()
"""


def test_no_rank_outlives_the_first(tiny_model: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", _DIES, str(tiny_model), str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        other = psutil.Process(int(first.stdout.readline()))
        first.kill()
        assert psutil.wait_procs([other], timeout=30)[1] == []


def test_engines_whose_names_begin_alike_meet_apart(tmp_path: Path) -> None:
    """`p-0` starts again while `p-0-0`, of a group that is called `p-0`, is meeting."""
    other = ranks._meeting(replace(options(tmp_path, tmp_path, 2), name="p-0-0"))
    (other / "meet").touch()
    mine = replace(options(tmp_path, tmp_path, 2), name="p-0")
    (ranks._meeting(mine) / "meet").touch()
    again = ranks._meeting(mine)
    assert list(again.iterdir()) == [], "what was left is gone"
    assert (other / "meet").exists()
