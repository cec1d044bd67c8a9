from __future__ import annotations

import msgspec
import pytest

from pdctl.supervisor.service.measurements import _hit_rate, _kv_used
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
