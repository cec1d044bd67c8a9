"""Invariants during faults: block counts are consistent, no lease is leaked, no process dies without a fault."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

# Allowed time after the supervisor saw the death, and otherwise after the deadline (sweeps run four times per second).
WITNESSED_S = 0.25
SLACK_S = 1.0


@dataclass
class Watch:
    """Polls engines directly; an engine that does not answer is skipped."""

    ports: dict[str, int]
    lease_s: float
    headers: dict[str, str]
    violations: list[str] = field(default_factory=list)
    reclaimed: list[float] = field(default_factory=list)
    polls: int = 0

    async def state(self, http: httpx.AsyncClient, name: str) -> dict[str, Any] | None:
        try:
            url = f"http://127.0.0.1:{self.ports[name]}/pdctl/v1/state"
            answer = await http.get(url, headers=self.headers, timeout=2)
        except httpx.HTTPError:
            return None
        return dict(answer.json())

    async def check(self, http: httpx.AsyncClient) -> None:
        """Check the counts of every engine, and leases without a sign of life."""
        for name in self.ports:
            state = await self.state(http, name)
            if state is None or not state["blocks_total"]:
                continue
            self.polls += 1
            kinds = ("free", "referenced", "leased", "quarantined")
            total = sum(state[f"blocks_{kind}"] for kind in kinds)
            if total != state["blocks_total"]:
                self.violations.append(f"{name}: {total} blocks in the books of {state['blocks_total']}")
            for lease in state["leases"]:
                if lease["quiet_s"] > self.lease_s + SLACK_S:
                    self.violations.append(
                        f"{name}: lease {lease['id']} lives {lease['quiet_s']} s after its last sign"
                    )

    async def no_lease_of(self, http: httpx.AsyncClient, holder: str, died_at: float) -> None:
        """Check that every prefill engine has freed the leases of `holder` in time."""
        worst = 0.0
        for name in [name for name in self.ports if name.startswith("prefill")]:
            while True:
                asked = time.monotonic()
                state = await self.state(http, name)
                if state is None or not any(lease["holder"] == holder for lease in state["leases"]):
                    break
                if asked - died_at > WITNESSED_S:
                    late = (
                        f"{name} still leases to {holder} {asked - died_at:.3f} s after its death was there to be seen"
                    )
                    self.violations.append(late)
                    break
                await asyncio.sleep(0.005)
            worst = max(worst, asked - died_at)
        self.reclaimed.append(worst)
