"""Probes of a supervisor that stood still itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from pdctl.adapters import Progress
from pdctl.net.pauses import Sleeper
from pdctl.plan import Probe
from pdctl.supervisor.process import probes
from pdctl.supervisor.process.probes import Cadence, Prober

STATE = Probe("", "", "http://127.0.0.1:1/state", "", interval_s=0.02, timeout_s=2.0, startup_s=20.0)


@pytest.mark.parametrize("pauses", [0, 3])
def test_its_own_silence_is_not_the_processs(monkeypatch: pytest.MonkeyPatch, pauses: int) -> None:
    asked, slept = [], []

    class Same(Prober):
        async def _ask(self, address: str) -> bytes | None:
            asked.append(address)
            return b""

    class Told(Sleeper):
        async def overslept(self, seconds: float) -> bool:
            slept.append(seconds)
            return len(slept) <= pauses

    # An hour passes between two probes.
    clock = SimpleNamespace(monotonic=lambda: 1000.0 + 3600.0 * len(slept))
    monkeypatch.setattr(probes, "time", clock)
    monkeypatch.setattr(probes, "Sleeper", Told)
    prober = Same(STATE, Path("/none"), "", lambda _: Progress(running=1, tokens_total=7, steps_total=7))
    reason = asyncio.run(prober._liveness(lambda: Cadence(1e-6, 3, 60.0, 0.0)))
    assert reason is not None
    assert reason.startswith("hung: 1 requests are running")
    assert len(asked) == pauses + 2
