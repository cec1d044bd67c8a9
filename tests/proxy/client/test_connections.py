"""When a client counts as too slow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from pdctl.proxy.client.connections import BoundedProtocol

SLOW: list[dict[str, Any]] = [
    {"stuck_since": 100.0}, {"receiving": True, "in_head": True, "began_at": 100.0},
    {"receiving": True, "began_at": 100.0}, {"idle_since": 100.0},
]  # fmt: skip


@pytest.mark.parametrize("state", SLOW)
def test_only_time_in_which_it_could_be_heard_counts(state: dict[str, Any]) -> None:
    usual = {"stuck_since": 0.0, "receiving": False, "in_head": False, "began_at": 0.0, "idle_since": 1e9}
    found = cast(BoundedProtocol, SimpleNamespace(cycle=None, **(usual | state)))
    assert not BoundedProtocol.late(found, 101.0)
    assert BoundedProtocol.late(found, 1000.0)
    assert not BoundedProtocol.late(found, 1000.0, awake_since=999.0)
    assert BoundedProtocol.late(found, 1900.0, awake_since=999.0)
