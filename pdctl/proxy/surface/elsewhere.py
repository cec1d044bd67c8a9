"""What the proxies of a cluster tell each other, through their agents: bodies in quarantine, and what API keys used."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdctl.proxy.request.generate import Completions
from pdctl.proxy.surface.internal import Internal, encoded, refused
from pdctl.proxy_wire import Quarantined, SpentNews, SpentReply


class ElsewhereSurface:
    """Internal routes: each takes what is known elsewhere, and answers what is known here."""

    def __init__(self, completions: Completions, internal: Internal, epoch: str) -> None:
        self._completions = completions
        self._internal = internal
        self._epoch = epoch

    def routes(self) -> list[Route]:
        """The routes for Starlette."""
        return [
            self._internal.route("/pdctl/v1/quarantine", self._found),
            self._internal.route("/pdctl/v1/quarantine", self._quarantine, "POST"),
            self._internal.route("/pdctl/v1/spent", self._spent, "POST"),
        ]

    async def _found(self, _: Request) -> Response:
        return encoded(Quarantined(self._completions.shared.quarantine.found()))

    async def _quarantine(self, request: Request) -> Response:
        try:
            bodies = msgspec.json.decode(await request.body(), type=Quarantined).bodies
            self._completions.shared.quarantine.told(bodies)
        except (msgspec.DecodeError, ValueError) as failure:
            return refused(400, f"not a list of digests: {failure}")
        return await self._found(request)

    async def _spent(self, request: Request) -> Response:
        accounts = self._completions.accounts
        try:
            news = msgspec.json.decode(await request.body(), type=SpentNews)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            return refused(400, f"not what was spent elsewhere: {failure}")
        accounts.spent_elsewhere(news)
        return encoded(SpentReply(self._epoch, accounts.spent()))
