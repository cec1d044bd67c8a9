"""What the live page gets of a proxy: sums over labels, whole histograms, the last requests."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette

from pdctl.net.openai.api import Counts
from pdctl.proxy.surface.figures import FiguresSurface
from pdctl.proxy.surface.internal import Internal
from pdctl.proxy.telemetry.counters import Counters, Histogram
from pdctl.proxy.telemetry.recent import RecentRequests
from pdctl.proxy.telemetry.timing import Timing
from pdctl.proxy_wire import Counted, Figures, RecentReply


def get(completions: Any, path: str, secret: str = "secret", given: str = "Bearer secret") -> httpx.Response:
    app = Starlette(routes=FiguresSurface(completions, Internal(secret)).routes())

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.get(path, headers={"authorization": given})

    return asyncio.run(ask())


@pytest.fixture
def completions() -> Any:
    counters = Counters({"ttft": Histogram([0.1, 1.0]), "itl": Histogram([0.01])})
    door = SimpleNamespace(admission=SimpleNamespace(queue=SimpleNamespace(requests=3)))
    shared = SimpleNamespace(metrics=SimpleNamespace(counters=counters))
    return SimpleNamespace(shared=shared, door=door, recent=RecentRequests())


@pytest.mark.parametrize("path", ["/pdctl/v1/figures", "/pdctl/v1/recent"])
@pytest.mark.parametrize(("secret", "given"), [("secret", "Bearer other"), ("secret", ""), ("", "Bearer "), ("", "")])
def test_only_for_the_supervisor(completions: Any, path: str, secret: str, given: str) -> None:
    assert get(completions, path, secret, given).status_code == 403
    assert not completions.recent.is_wanted


def test_figures_are_sums(completions: Any) -> None:
    counters = completions.shared.metrics.counters
    for status, count in (("200", 5), ("429", 2), ("503", 1)):
        counters.count("requests", status, by=count)
    for engine in ("a", "b"):
        counters.count("failovers", engine)
    counters.count("tokens", by=70)
    counters.histograms["ttft"].add(0.5, 2)
    found = msgspec.json.decode(get(completions, "/pdctl/v1/figures").content, type=Figures)
    assert found == Figures(
        answered=5, failed=3, tokens=70, prompt_tokens=0, failovers=2, waiting=3,
        ttft=Counted([0.1, 1.0], [0, 2, 0], 1.0), itl=Counted([0.01], [0, 0], 0.0),
    )  # fmt: skip


def test_requests_are_kept_from_the_first_question_on(completions: Any) -> None:
    assert get(completions, "/pdctl/v1/figures").status_code == 200
    assert completions.recent.is_wanted
    completions.recent.add("r1", "/v1/completions", 200, Counts(3, 4), Timing())
    (kept,) = msgspec.json.decode(get(completions, "/pdctl/v1/recent").content, type=RecentReply).requests
    assert (kept.id, kept.prompt_tokens, kept.output_tokens) == ("r1", 3, 4)
