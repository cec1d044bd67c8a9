"""A hand-over for tests."""

from __future__ import annotations

from pdctl.wire import HandOver
from tests.engine.front.handover.rig import ENDPOINT


def hand_over(lease_id: str = "e.1") -> HandOver:
    return HandOver("p0", "r1", "127.0.0.1", 8101, [1, 2], 8, "digest", lease_id, "e", 30.0, 7, ENDPOINT)
