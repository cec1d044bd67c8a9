"""What the live page wants of a proxy: its counts, and the last requests."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdctl.proxy.request.generate import Completions
from pdctl.proxy.surface.internal import Internal, encoded
from pdctl.proxy.telemetry.counters import Histogram
from pdctl.proxy_wire import Counted, Figures, RecentReply

# Counters of which the live page wants the sum over all labels.
_SUMS = ("tokens", "prompt_tokens", "failovers")


class FiguresSurface:
    """Internal routes. Whoever asks for figures will want requests, too: from then on they are kept."""

    def __init__(self, completions: Completions, internal: Internal) -> None:
        self._completions = completions
        self._internal = internal

    def routes(self) -> list[Route]:
        """The routes for Starlette."""
        return [
            self._internal.route("/pdctl/v1/figures", self._figures),
            self._internal.route("/pdctl/v1/recent", self._recent),
        ]

    async def _figures(self, _: Request) -> Response:
        completions = self._completions
        completions.recent.ask()
        counters = completions.shared.metrics.counters
        found = counters.by_name(("requests", *_SUMS))
        sums = {name: sum(found[name].values()) for name in _SUMS}
        statuses = found["requests"]
        answered = statuses.get(("200",), 0.0)
        figures = Figures(
            answered=answered,
            failed=sum(statuses.values()) - answered,
            tokens=sums["tokens"],
            prompt_tokens=sums["prompt_tokens"],
            failovers=sums["failovers"],
            waiting=completions.door.admission.queue.requests,
            ttft=_counted(counters.histograms["ttft"]),
            itl=_counted(counters.histograms["itl"]),
        )
        return encoded(figures)

    async def _recent(self, _: Request) -> Response:
        return encoded(RecentReply(self._completions.recent.ask()))


def _counted(histogram: Histogram) -> Counted:
    return Counted(list(histogram.bounds), list(histogram.counts), histogram.total)
