"""The engine on a GPU. Skipped without a GPU; `pytest -rs` shows the reason."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.cache.columns import Columns
from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import plane_offsets
from pdctl.engine.cache.memory import Bytes
from pdctl.engine.executor.exported import mapped
from pdctl.engine.executor.launches import Launches, Step
from pdctl.engine.executor.single import SingleExecutor
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.attention import BACKENDS, open_backend
from pdctl.engine.model.attention.batch import LayerNeed, PoolNeed
from pdctl.engine.model.attention.choice import check, choose
from pdctl.engine.model.graphs import CudaRecorder
from pdctl.engine.model.loading import load_model
from pdctl.engine.model.parallel.group import Ranks, Width
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.model.sampler import sample
from pdctl.engine.options import parse
from pdctl.engine.schedule.ahead import LAUNCHED
from pdctl.engine.schedule.batch import Limits, Slice
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.wire import LayerShape, Manifest
from tests.engine.model.test_loading import paged, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU path was not tested"),
]


PLAIN = LayerNeed(16, 8, 128, 128)
LAYERS = [
    PLAIN,
    LayerNeed(32, 8, 64, 64),
    LayerNeed(8, 1, 256, 256),
    LayerNeed(12, 4, 80, 80),
    PLAIN._replace(window=100),
    PLAIN._replace(softcap=30.0),
    PLAIN._replace(has_sinks=True, window=64),
]


def runner(model: Path, attention: str = "gather") -> ModelRunner:
    device = torch.device("cuda")
    loaded = load_model(str(model), device, torch.float32)
    backend = open_backend(attention, device)
    manifest = Manifest(loaded.fingerprint, loaded.dtype, 16, loaded.shapes)
    return ModelRunner(loaded, KvPool(manifest, 64, None, device), device, backend=backend)


@pytest.mark.parametrize("attention", ["gather", "triton"])
def test_paged_output_on_the_gpu_equals_generate_on_the_cpu(tiny_model: Path, attention: str) -> None:
    prompts = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 33, 100)]
    made = runner(tiny_model, attention)
    made.self_check()
    expected = reference(tiny_model, prompts)
    assert paged(made, prompts, tokens=64, fragment=False) == expected
    assert paged(made, prompts, tokens=64, fragment=True) == expected


def test_graphs_compute_what_steps_without_them_do(tiny_model: Path) -> None:
    prompts = [[5, 9, 2], list(range(60)), [7] * 20]
    made, last = runner(tiny_model, "triton"), 63
    assert made.capture(4, 512, last, CudaRecorder(torch.device("cuda"))) == [1, 2, 4]
    made.pool.poison(list(range(last)))
    assert paged(made, prompts, tokens=64, fragment=True) == reference(tiny_model, prompts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "gather"])
def test_attention_agrees_with_gather(name: str, block_size: int, dtype: torch.dtype) -> None:
    """Each kind of layer that the backend takes, on this GPU."""
    device, pool = torch.device("cuda"), PoolNeed(dtype, block_size)
    try:
        backend = open_backend(name, device)
    except (ImportError, RuntimeError) as failure:
        pytest.skip(f"NOT TESTED: {failure}")
    refusals = []
    for layer in LAYERS:
        if reason := backend.refuses(layer, pool):
            refusals.append(reason)
        else:
            check(backend, layer, pool, device)
    if len(refusals) == len(LAYERS):
        pytest.skip(f"refused: {refusals[0]}")


def test_what_is_chosen_is_one_of_the_fast_ones() -> None:
    chosen = choose("auto", LAYERS, PoolNeed(torch.bfloat16, 16), torch.device("cuda"))
    assert chosen.backend.name in ("flashinfer", "triton"), chosen.reason


def test_an_engine_fills_its_share_of_the_gpu_and_computes(tiny_model: Path, tmp_path: Path) -> None:
    options = parse([
        "--name", "e", "--model", str(tiny_model), "--port", "1", "--run-dir", str(tmp_path), "--epoch", "e1",
        "--device", "cuda", "--gpu-memory-utilization", "0.2", "--max-num-seqs", "4",
    ])  # fmt: skip
    before = torch.cuda.memory_allocated()
    executor = SingleExecutor.load(options)
    taken = (torch.cuda.memory_allocated() - before) / torch.cuda.mem_get_info()[1]
    assert 0.1 < taken < 0.2, "the KV has what the weights and a step leave"
    assert executor.pool_blocks == executor.num_blocks + 1
    assert executor.graphs.startswith("decode steps of up to"), executor.graphs
    blocks = [executor.num_blocks - 1, 5]
    sequence = Sequence("r", [5, 9, 2, 7], 4, Sampling(max_tokens=2, temperature=0.0), block_ids=blocks)
    [[first], _] = executor.execute([Slice(sequence, 0, 4, True)])
    sequence.token_ids.append(first)
    graphed = executor.execute([Slice(sequence, 4, 1, True)])[0]
    executor._runner._graphs = None
    assert executor.execute([Slice(sequence, 4, 1, True)])[0] == graphed
    executor.close()
    del executor
    gc.collect()
    torch.cuda.empty_cache()


def answers(made: ModelRunner, ahead: bool) -> dict[str, list[int]]:
    """Greedy and seeded outputs of an engine's loop, some of which end before their neighbours."""
    limits = Limits(4, 64, 512, 16, frozenset())
    scheduler = Scheduler(limits, BlockAllocator(63, made.pool.poison))
    launches = Launches(made, in_thread=False)
    for number in range(7):
        prompt = [(7 * number + at) % 250 for at in range(5 + 9 * number)]
        sampling = Sampling(
            8 + 5 * number, temperature=float(number % 2), seed=number, top_p=0.9, top_k=60,
            stop_token_ids=list(range(10 * number)),
        )  # fmt: skip
        assert scheduler.add(Sequence(f"{number}", prompt, len(prompt), sampling)) is None
    outputs: dict[str, list[int]] = {}
    flight: Step | None = None
    while flight is not None or scheduler.has_work:
        current = flight or launches.launch(scheduler.schedule())
        following = scheduler.schedule_ahead(current.batch) if ahead else []
        flight = launches.launch(following, current) if following else None
        for token in scheduler.update(current.batch, *current.finish()).tokens:
            outputs.setdefault(token.request_id, []).append(token.token_id)
        scheduler.audit()
    assert (scheduler.ahead.asked.get(LAUNCHED, 0) > 10) == ahead
    assert scheduler.allocator.num_free == 63
    return outputs


@pytest.mark.parametrize("graphs", [False, True], ids=["without graphs", "graphs"])
@pytest.mark.parametrize("attention", ["gather", "triton"])
def test_steps_launched_ahead_give_the_same_tokens(tiny_model: Path, attention: str, graphs: bool) -> None:
    made = runner(tiny_model, attention)
    if graphs and not made.backend.is_capturable:
        pytest.skip("this backend has no graphs")
    if graphs:
        made.capture(4, 512, 63, CudaRecorder(torch.device("cuda")))
    made.pool.poison(list(range(63)))
    assert answers(made, ahead=True) == answers(made, ahead=False)


def test_launching_a_step_waits_for_nothing(tiny_model: Path) -> None:
    """The device is busy for a while before both steps; they are launched, with seeded draws, before it is done."""
    made = runner(tiny_model, "triton")
    made.capture(4, 512, 63, CudaRecorder(torch.device("cuda")))
    launches = Launches(made, in_thread=False)
    samplings = [Sampling(9, 0.0), Sampling(9, 1.0, seed=1), Sampling(9, 0.7, top_p=0.9, top_k=40, min_p=0.01, seed=2)]
    sequences = [Sequence(f"{n}", [5 + n], 1, one, block_ids=[n]) for n, one in enumerate(samplings)]
    batch = [[Slice(sequence, at, 1, True) for sequence in sequences] for at in range(2)]
    # The first time kernels are loaded.
    warm = launches.launch(batch[0])
    launches.launch(batch[1], warm).finish()
    torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
    busy = torch.cuda.current_stream().record_event()
    first = launches.launch(batch[0])
    second = launches.launch(batch[1], first)
    assert not busy.query(), "something waited for the device"
    assert first.finish()[0] == warm.finish()[0]
    assert len(second.finish()[0]) == 3


@pytest.mark.parametrize("count", [1, 40, 130])
def test_draws_on_the_gpu_are_those_on_the_cpu(count: int) -> None:
    rows = torch.randn(count, 5000, generator=torch.Generator().manual_seed(count)) * 3
    kinds = [Sampling(1, 0.0), Sampling(1, 1.0), Sampling(1, 0.7, 0.9), Sampling(1, 1.0, top_k=40, min_p=0.05)]
    wants = [(structs.replace(kinds[n % 4], seed=n), 100 + n) for n in range(count)]
    assert sample(rows.cuda(), wants) == sample(rows, wants)


def test_blocks_go_through_the_host_mirror(tiny_model: Path) -> None:
    source, target = runner(tiny_model).pool, runner(tiny_model).pool
    for plane in (*source.keys, *source.values):
        plane.normal_()
    sent = source.mirror("a")
    source.publish([3, 4])
    slots, read, columns, at = np.arange(48, 80), list[Bytes](), list[Columns](), 0
    for number, (start, per_block) in enumerate(plane_offsets(source.manifest, source.num_blocks)):
        read.append(sent.bytes[start + 3 * per_block : start + 5 * per_block])
        columns.append(Columns(at, at + 2 * per_block, number, 0, 0, per_block // source.block_size))
        at += 2 * per_block
    target.fill(np.concatenate(read), slots, columns)
    for mine, theirs in zip((*source.keys, *source.values), (*target.keys, *target.values), strict=True):
        assert torch.equal(mine[48:80], theirs[48:80])


_RANK = """
import sys
import torch
from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.executor.exported import export
from pdctl.wire import LayerShape, Manifest
device = torch.device("cuda", 0)
pool = KvPool(Manifest("m", "float16", 16, [LayerShape(2, 64, 64)] * 3), 64, None, device)
pool.store.copy_(torch.arange(len(pool.store), device=device) % 251)
torch.cuda.synchronize()
print(export(pool), flush=True)
sys.stdin.readline()
print(int(pool.store[5]), flush=True)
"""


def test_the_pool_of_another_process_is_mapped() -> None:
    """As the core maps those of its other ranks; here both have one GPU."""
    with subprocess.Popen(
        [sys.executable, "-c", _RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as rank:
        assert rank.stdout is not None
        assert rank.stdin is not None
        manifest, device = Manifest("m", "float16", 16, [LayerShape(2, 64, 64)] * 3), torch.device("cuda", 0)
        [pool] = mapped([manifest], 64, [rank.stdout.readline().strip()], [device])
        assert pool.device_memory.place
        assert torch.equal(pool.store, (torch.arange(len(pool.store), device=device) % 251).to(torch.uint8))
        pool.store[5] = 77
        torch.cuda.synchronize()
        rank.stdin.write("\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "77\n", "and what is written here is there"


def test_one_rank_of_nccl_adds_and_joins(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    group = Ranks(0, Width(), tmp_path / "meet", 30.0, device)
    group.meet()
    part = torch.arange(6.0, device=device).view(2, 3)
    assert torch.equal(group.add(part.clone()), part)
    assert torch.equal(group.join(part), part)
    assert torch.equal(group.gather(part, [2]), part)
    group.close()
    # An engine's process ends instead.
    torch.distributed.destroy_process_group()
