"""Engines that are used and not started: whether they answer."""

from __future__ import annotations

from dataclasses import asdict

from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.plan import Attached

# One that has not answered by then is shown as silent, seconds.
_ASK_S = 1.0


class AttachedWatch:
    """What they answered last."""

    def __init__(self) -> None:
        self._answers: dict[str, bool] = {}

    async def ask(self, attached: Attached) -> None:
        """Ask one now."""
        pool = ConnectionPool(attached.host, attached.port, connect_s=_ASK_S)
        try:
            self._answers[attached.name] = (await pool.request("GET", "/health", timeout_s=_ASK_S)).status == 200
        except Unreachable:
            self._answers[attached.name] = False
        finally:
            pool.close()

    def status(self, attached: Attached) -> dict[str, object]:
        """As `pdctl status --json` shows it."""
        return {**asdict(attached), "answers": self._answers.get(attached.name)}
