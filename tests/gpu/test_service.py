"""A real service with engines that share one GPU: equal answers, deaths, memory freed. Skipped without a GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pdctl.host.devices.gpu import gpu_use, read_gpus
from tests.e2e.test_death import stream_with
from tests.service import Run, Service, pid_of, running, topology, wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU path was not tested"),
]

SHARED = 'device = "cuda"\nshare_gpu = true'
PROMPTS = [[(7 * n + k) % 250 + 3 for k in range(length)] for n, length in enumerate((3, 16, 90, 600, 1500))]
TOKENS = 48


@pytest.fixture(scope="module")
def pair(module_run: Run) -> Iterator[Service]:
    """1 prefill and 1 decode engine on one GPU."""
    with running(module_run, topology(engine_extra=SHARED)) as service:
        yield service


@pytest.fixture(scope="module")
def alone(module_run: Run, pair: Service) -> list[dict[str, Any]]:
    """The pair's answers without other load."""
    return [pair.complete(prompt, max_tokens=TOKENS, ignore_eos=True) for prompt in PROMPTS]


def test_the_status_names_the_gpu(pair: Service) -> None:
    uuid = read_gpus()[0].uuid
    assert {tuple(engine.gpus) for engine in pair.engines()} == {(uuid,)}


def test_kv_moves_within_the_gpu_and_attention_is_a_fast_one(pair: Service) -> None:
    assert {link.transport for link in pair.status().links} == {"cuda_ipc"}
    for engine in pair.engines():
        assert (engine.attention or "").partition(":")[0] in ("flashinfer", "varlen", "triton"), engine.attention
        assert (engine.cuda_graphs or "").startswith("decode steps of up to"), engine.cuda_graphs


def test_a_pair_on_one_gpu_answers_like_one_engine(run: Run, alone: list[dict[str, Any]]) -> None:
    with running(run, topology(prefills=0, decodes=0, hybrids=1, engine_extra=SHARED)) as hybrid:
        whole = [hybrid.complete(prompt, max_tokens=TOKENS, ignore_eos=True)["token_ids"] for prompt in PROMPTS]
    assert [answer["token_ids"] for answer in alone] == whole


def test_streams_equal_whole_answers(pair: Service, alone: list[dict[str, Any]]) -> None:
    for prompt, expected in zip(PROMPTS, alone, strict=True):
        assert pair.stream(prompt, max_tokens=TOKENS, ignore_eos=True)["token_ids"] == expected["token_ids"]


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_a_stream_goes_on_when_an_engine_is_killed(pair: Service, victim: str) -> None:
    """Tokens from before the failover are kept. After it, bfloat16 may decide a tie differently: docs/limits.md."""
    pair.healthy()
    quiet = stream_with(pair, 8, lambda: None)
    before = pair.process(victim)
    ids = stream_with(pair, 8, lambda: os.kill(pid_of(before), signal.SIGKILL))
    assert len(ids) == len(quiet)
    assert ids[:9] == quiet[:9]
    pair.restarted(before)
    pair.healthy()
    pair.idle()


def test_memory_of_the_gpu_is_given_back(run: Run) -> None:
    gpu = read_gpus()[0].uuid
    before = gpu_use([gpu])[gpu].used
    with running(run, topology(engine_extra=SHARED)):
        assert gpu_use([gpu])[gpu].used > before + 2**28
    wait_until(lambda: gpu_use([gpu])[gpu].used <= before + 2**26, 30, "the GPU's memory back")
