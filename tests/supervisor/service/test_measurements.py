from __future__ import annotations

import msgspec
import pytest

from pdctl.proxy_wire import KeysReply, KeyUse
from pdctl.supervisor.service.measurements import _hit_rate, _kv_used, keys_status
from pdctl.topology.spec import ApiKey
from pdctl.wire import EngineState


def state(total: int, free: int, cached: int) -> EngineState:
    return EngineState(
        name="e", role="decode", epoch="1", blocks_total=total, blocks_free=free, blocks_cached=cached,
        blocks_referenced=total - free, blocks_leased=0, blocks_quarantined=0, blocks_reserved=0, held_back=0,
        running=0, waiting=0, tokens_total=0, leases=[], links=[], transfers={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "used"),
    [(state(100, 100, 60), 0.0), (state(100, 75, 60), 0.25), (state(100, 0, 0), 1.0), (state(0, 0, 0), None)],
)
def test_blocks_that_are_kept_for_their_content_are_not_in_use(found: EngineState, used: float | None) -> None:
    assert _kv_used(found) == used


@pytest.mark.parametrize(
    ("counters", "rate"),
    [({}, None), ({"prefix_tokens": 0}, None), ({"prefix_tokens": 300}, 0.0),
     ({"prefix_tokens": 300, "prefix_hits": 100}, 0.3333)],
)  # fmt: skip
def test_the_hit_rate_is_unknown_without_prompts(counters: dict[str, int], rate: float | None) -> None:
    assert _hit_rate(msgspec.structs.replace(state(10, 10, 0), counters=counters)) == rate


def test_keys_are_summed_over_the_workers() -> None:
    settings = ApiKey("a", 2.0, requests_per_minute=60, priority=1), ApiKey("*", streams=4)
    one = KeyUse(2, 1, 10, 3, 100, 40, 50, 5.0, 2.0, 4, requests_left=7.9)
    other = KeyUse(1, 0, 10, 0, 1, 0, 1, 1.0, 1.0, 2, requests_left=5.2)
    found = keys_status(settings, [KeysReply({"a": one}), KeysReply({"a": other, "b": KeyUse()})]).keys
    assert [key.name for key in found] == ["a", "b"]
    a, b = found
    assert (a.weight, a.priority, a.running, a.waiting, a.requests, a.refused) == (2.0, 1, 3, 1, 20, 3)
    assert (a.prompt_tokens, a.cached_tokens, a.output_tokens, a.queue_s, a.ttft_s) == (101, 40, 51, 0.3, 0.5)
    assert (a.requests_per_minute, a.requests_left, a.tokens_per_minute, a.tokens_left) == (60, 5, None, None)
    assert (b.weight, b.streams, b.ttft_s, b.queue_s, a.streams) == (1.0, 4, None, 0.0, None)
