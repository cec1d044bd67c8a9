"""The targets of a request: its own, or the service's."""

from __future__ import annotations

import pytest

from pdctl.engine.front.api.targets import priority_in, targets
from pdctl.net.openai.fields import RequestSlo
from pdctl.wire import ORDER_HEADER


@pytest.mark.parametrize(
    ("own", "header", "expected"),
    [
        (None, "2000 200", (2.0, 0.2)),
        (None, "", (0.0, 0.0)),
        (RequestSlo(ttft_ms=500), "2000 200", (0.5, 0.2)),
        (RequestSlo(tpot_ms=50), "2000 200", (2.0, 0.05)),
        (RequestSlo(ttft_ms=500, tpot_ms=50), "", (0.5, 0.05)),
        (None, "abc 200", (0.0, 0.0)),
        (None, "nan 200", (0.0, 0.0)),
        (None, "-1 200", (0.0, 0.0)),
        (None, "1 2 3", (0.0, 0.0)),
        (None, "inf 5", (0.0, 0.0)),
    ],
)
def test_own_targets_come_first(own: RequestSlo | None, header: str, expected: tuple[float, float]) -> None:
    assert targets(own, header) == expected


def test_the_proxys_order_comes_before_a_requests_own_priority() -> None:
    """Whatever priority a request has, one that the proxy puts before it goes first."""
    least, most = -(2**31), 2**31
    found = [priority_in({ORDER_HEADER: str(order)}, own) for order in (-3, 0, 1, 2) for own in (least, 0, most)]
    assert found == sorted(set(found))
    assert all(abs(priority) < 2**62 for priority in (priority_in({ORDER_HEADER: str(2**20)}, most), *found))
    for wrong in ("", "x", "1.5", str(2**40)):
        assert priority_in({ORDER_HEADER: wrong}, 7) == 7
    assert priority_in({}, 7) == 7
