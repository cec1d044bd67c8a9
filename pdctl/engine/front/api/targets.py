"""The latency targets of a request: its own, or else those of the service, which the proxy sends along; and its
priority within the order of the proxy."""

from __future__ import annotations

from collections.abc import Mapping

from pdctl.net.openai.fields import RequestSlo
from pdctl.wire import ORDER_HEADER

# A day.
MOST_MS = 86_400_000
# More than the number of priorities that a request may have, and the largest order that the proxy sends.
_PRIORITIES, _MOST_ORDER = 2**33, 2**20


def targets(own: RequestSlo | None, service: str) -> tuple[float, float]:
    """Targets for the first token and for each later one, in seconds; 0 for none. `service`: the proxy's header, ""
    without a proxy."""
    first, later = _of_service(service)
    if own is not None:
        first = first if own.ttft_ms is None else own.ttft_ms
        later = later if own.tpot_ms is None else own.tpot_ms
    return first / 1000, later / 1000


def _of_service(header: str) -> tuple[float, float]:
    try:
        first, later = map(float, header.split())
    except ValueError:
        return 0.0, 0.0
    return (first, later) if 0 <= first <= MOST_MS and 0 <= later <= MOST_MS else (0.0, 0.0)


def priority_in(headers: Mapping[str, str], own: int) -> int:
    """A request's priority, after the order in the proxy's header: its own counts only among requests of the same
    order."""
    try:
        order = int(headers.get(ORDER_HEADER, "0"))
    except ValueError:
        return own
    return order * _PRIORITIES + own if abs(order) <= _MOST_ORDER else own
