"""The engine's internal endpoints: leases, offers, links, state. Peers and the supervisor call them."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdctl.engine.front.api.metrics import render_metrics
from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.handover.lease_desk import LeaseDesk
from pdctl.engine.front.handover.links import LinkBook
from pdctl.engine.front.handover.receiver import Receiver
from pdctl.engine.options import EngineOptions
from pdctl.net.openai_api import ApiError
from pdctl.wire import (
    AttemptCall,
    EndpointReply,
    EngineState,
    HolderCall,
    LeaseCall,
    LeaseReply,
    LinkCall,
    Offer,
    RenewCall,
    RevokeCall,
    RoleCall,
)

# Peers' messages are small: a hand-over of the longest prompt has a few thousand block ids.
_MAX_BODY = 4 * 2**20

Call = TypeVar("Call", bound=msgspec.Struct)


class Control:
    """The data and actions behind the endpoints."""

    def __init__(
        self,
        options: EngineOptions,
        secret: str,
        core: CoreClient,
        leases: LeaseDesk,
        links: LinkBook,
        receiver: Receiver,
    ) -> None:
        self._options = options
        self._secret = secret
        self._core = core
        self._leases = leases
        self._links = links
        self._receiver = receiver
        # The supervisor tells it once the engine is ready; until then it takes everything.
        self._role = RoleCall("hybrid")

    def routes(self) -> list[Route]:
        """All routes except generation."""
        leases = self._leases
        posts: dict[
            str,
            _Posted[LeaseCall] | _Posted[RenewCall] | _Posted[RevokeCall] | _Posted[HolderCall] | _Posted[AttemptCall],
        ]
        posts = {
            "leases/claim": _Posted(self, LeaseCall, leases.claim),
            "leases/commit": _Posted(self, LeaseCall, leases.commit),
            "leases/release": _Posted(self, LeaseCall, leases.release),
            "leases/renew": _Posted(self, RenewCall, leases.renew),
            "leases/revoke": _Posted(self, RevokeCall, leases.revoke),
            "holders/release": _Posted(self, HolderCall, leases.release_holder),
            "attempts/release": _Posted(self, AttemptCall, leases.give_up),
        }
        offers, links = _Posted(self, Offer, self._offer), _Posted(self, LinkCall, self._link)
        role = _Posted(self, RoleCall, self._take_role)
        return [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/pdctl/v1/state", self._state),
            Route("/pdctl/v1/endpoint", self._endpoint),
            Route("/pdctl/v1/offers", offers.answer, methods=["POST"]),
            Route("/pdctl/v1/links", links.answer, methods=["POST"]),
            Route("/pdctl/v1/role", role.answer, methods=["POST"]),
            *(Route(f"/pdctl/v1/{path}", post.answer, methods=["POST"]) for path, post in posts.items()),
        ]

    @property
    def has_secret(self) -> bool:
        """Whether the engine belongs to a service with a secret."""
        return bool(self._secret)

    def is_internal(self, authorization: str) -> bool:
        """Whether a call carries this run's secret. Without a secret no call is internal."""
        return bool(self._secret) and hmac.compare_digest(authorization.encode(), f"Bearer {self._secret}".encode())

    def state(self) -> EngineState:
        """The current counts and leases."""
        ready, books, totals = self._core.ready, self._core.books, self._receiver.totals
        return EngineState(
            name=self._options.name,
            role=self._role.role,
            epoch=self._options.epoch,
            blocks_total=ready.num_blocks if ready else 0,
            blocks_free=books.blocks_free,
            blocks_cached=0,
            blocks_referenced=books.blocks_referenced,
            blocks_leased=books.blocks_leased,
            blocks_quarantined=books.blocks_quarantined,
            blocks_reserved=books.blocks_reserved,
            held_back=books.held_back,
            running=books.running,
            waiting=books.waiting,
            tokens_total=self._core.tokens_total,
            leases=self._leases.infos(ready.block_bytes if ready else 0),
            links=self._links.infos(),
            transfers={
                "hand_overs": totals.hand_overs,
                "pulls": totals.pulls,
                "lost": totals.lost,
                "early": totals.early,
                "bytes": totals.bytes,
                "seconds": round(totals.seconds, 6),
                "hand_over_seconds": round(totals.hand_over_seconds, 6),
            },
            block_size=self._options.block_size,
            max_num_seqs=self._options.max_num_seqs,
            steps_total=books.steps,
            silent_s=round(self._core.silent_s, 3),
        )

    async def _health(self, _: Request) -> Response:
        return Response(status_code=200 if self._core.ready else 503)

    async def _metrics(self, _: Request) -> Response:
        text = render_metrics(self.state(), self._leases, self._core.quarantined_block_seconds())
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _state(self, _: Request) -> Response:
        return answer(200, self.state())

    async def _endpoint(self, request: Request) -> Response:
        ready = self._core.ready
        if not self.is_internal(request.headers.get("authorization", "")):
            return refusal(ApiError(403, "only this service's own processes may read KV addresses"))
        if ready is None:
            return refusal(ApiError(503, "the model is still loading", "service_unavailable"))
        return answer(200, EndpointReply(self._options.epoch, self._core.endpoint))

    async def _offer(self, offer: Offer) -> LeaseReply:
        return self._receiver.offer(offer)

    def _take_role(self, call: RoleCall) -> RoleCall:
        self._role = call
        return call

    async def _link(self, call: LinkCall) -> msgspec.Struct:
        return await self._links.make(call)


class _Posted(Generic[Call]):
    """One internal POST endpoint: check the secret and the size, decode the message, act on it."""

    def __init__(
        self, control: Control, kind: type[Call], act: Callable[[Call], msgspec.Struct | Awaitable[msgspec.Struct]]
    ) -> None:
        self._control = control
        self._decoder = msgspec.json.Decoder(kind)
        self._act = act

    async def answer(self, request: Request) -> Response:
        if not self._control.is_internal(request.headers.get("authorization", "")):
            return refusal(ApiError(403, "only this service's own processes may use leases"))
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MAX_BODY:
                return refusal(ApiError(413, f"the body is larger than {_MAX_BODY} bytes"))
        try:
            call = self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            return refusal(ApiError(400, f"malformed call: {failure}"))
        done = self._act(call)
        return answer(200, await done if isinstance(done, Awaitable) else done)


def answer(status: int, body: msgspec.Struct) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def refusal(failure: ApiError) -> Response:
    """An error in OpenAI's format."""
    return Response(failure.body(), failure.status, media_type="application/json")
