"""The supervisor's calls to LMDeploy engines, over real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pdctl.adapters import Ability, control
from pdctl.adapters.lmdeploy.control import link_type
from pdctl.adapters.lmdeploy.messages import LinkType
from tests.adapters.lmdeploy.messages import Scripted, linked, swept

STEPS = ["p2p_initialize", "p2p_connect", "p2p_drop_connect"]


def test_a_link_is_made_and_dropped_at_both_ends_with_the_key_of_each() -> None:
    reader, server = Scripted(), Scripted()
    [link] = linked(reader, server)
    assert (link.peer, link.epoch, link.error, link.protocol) == ("p0", "e", "", "rdma")
    assert reader.paths() == server.paths() == STEPS
    (_, ours), (_, theirs) = reader.sent[0], server.sent[0]
    assert ours["local_engine_id"] == theirs["remote_engine_id"]
    assert ours["remote_engine_config"]["num_gpu_blocks"] == 1024
    rank = reader.sent[1][1]["remote_kvtransfer_endpoint_info"][0]
    assert rank["of_a_later_version"] == 1, "what pdctl does not know is passed on"
    assert all(b"Bearer key0\r\n" in head for head in reader.headers)
    assert all(b"Bearer key1\r\n" in head for head in server.headers)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"p2p_initialize": 500}, "status 500"),
        ({"p2p_connect": 503}, "status 503"),
        ({"p2p_connect": {"status": 2}}, "p2p_connect with status 2"),
        ({"p2p_initialize": b"null"}, "is not a"),
        ({"engine_info": {"tp_size": 1}}, "status 200"),
        ({"engine_info": 404}, "status 404"),
    ],
)  # fmt: skip
def test_a_failure_at_one_end_is_the_pairs_and_may_be_temporary(answers: dict[str, Any], reason: str) -> None:
    good, bad = Scripted(), Scripted(**answers)
    first, second = linked(Scripted(), good, bad)
    assert not first.error
    assert reason in second.error
    assert not second.refused


def test_kv_that_does_not_fit_is_refused() -> None:
    for other in (Scripted(tp=2), Scripted(dtype="fp8")):
        [link] = linked(Scripted(), other)
        assert link.refused
        assert link.error
    [link] = linked(Scripted(), Scripted(tp=2))
    assert "tp_size is 1 here and 2 there" in link.error


def test_an_engine_that_does_not_answer_ends_at_the_deadline() -> None:
    silent = Scripted()

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent.serve = never  # type: ignore[method-assign]
    [link] = linked(Scripted(), silent, timeout_s=0.2)
    assert link.error


def test_a_sweep_frees_every_number_that_may_be_in_use() -> None:
    metrics = b'lmdeploy:num_requests_succeeded{engine="0"} 300.0\nlmdeploy:num_requests_failed{engine="0"} 5.0\n'
    engine = Scripted(metrics=metrics)
    assert swept(engine, 0, 20) == 305
    numbers = sorted(body["remote_session_id"] for _, body in engine.sent)
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 305
    again = Scripted()
    assert swept(again, 305, 310) == 310
    numbers = [body["remote_session_id"] for _, body in again.sent]
    assert 0 < min(numbers) < 305
    assert max(numbers) > 310


def test_start_and_progress_are_read_from_metrics() -> None:
    asks = control("lmdeploy")
    assert asks.abilities == {Ability.LINK, Ability.SWEEP}
    body = (
        b'# TYPE x gauge\nlmdeploy:num_requests_running{engine="0",model_name="m"} 3.0\n'
        b'lmdeploy:prompt_tokens_total{engine="0"} 10.0\nlmdeploy:generation_tokens_total{engine="0"} 2.0\n'
        b"process_start_time_seconds 1.79e+09\n"
    )
    found = asks.progress(body)
    assert (found.running, found.tokens_total) == (3, 12)
    assert asks.start_of(body) == "1790000000.00"
    assert asks.start_of(b"404") == ""


def test_the_link_layer_is_that_of_this_machines_ports(tmp_path: Path) -> None:
    assert link_type(tmp_path) is LinkType.ROCE, "a machine without RDMA"
    for number, (state, layer, expected) in enumerate(
        [
            ("1: DOWN", "Ethernet", LinkType.ROCE),
            ("4: ACTIVE", "InfiniBand", LinkType.INFINIBAND),
            ("4: ACTIVE", "Ethernet", LinkType.ROCE),
        ]
    ):
        port = tmp_path / f"class/infiniband/mlx5_{number}/ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
        (port / "link_layer").write_text(layer)
        assert link_type(tmp_path) is expected
