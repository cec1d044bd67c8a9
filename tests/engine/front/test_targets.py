"""The targets of a request: its own, or the service's."""

from __future__ import annotations

import pytest

from pdctl.engine.front.api.targets import targets
from pdctl.net.openai_fields import RequestSlo


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
