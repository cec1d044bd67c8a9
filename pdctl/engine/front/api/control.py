"""The engine's internal endpoints: leases, offers, links, state. Peers and the supervisor call them."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pdctl.engine.front.api.metrics import AHEAD, render_metrics, tier_counters
from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.handover.lease_desk import LeaseDesk
from pdctl.engine.front.handover.links import LinkBook
from pdctl.engine.front.handover.moves import Moves
from pdctl.engine.front.handover.peers import ATTEMPTS_PATH, BLOCKS_PATH, PREFIX_PATH, SESSION_PATH
from pdctl.engine.front.handover.receiver import Receiver
from pdctl.engine.front.handover.role import RoleDesk
from pdctl.engine.front.kv_events import KvEvents
from pdctl.engine.front.posted import Done, Posted, answer, refusal
from pdctl.engine.front.prefixes.desk import PrefixDesk
from pdctl.engine.front.routers.desk import RouterDesk
from pdctl.engine.front.routers.distserve import DistServe
from pdctl.engine.options import EngineOptions
from pdctl.net import asgi
from pdctl.net.identity.peers import claims_too_much
from pdctl.net.openai.api import ApiError
from pdctl.wire import (
    PIECES_PATH,
    AttemptCall,
    BlocksCall,
    EndpointReply,
    EngineState,
    HolderCall,
    LeaseCall,
    LinkCall,
    MoveCall,
    NeighboursCall,
    Offer,
    PrefixCall,
    RenewCall,
    RevokeCall,
    RoleCall,
    SessionCall,
)

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
        moves: Moves,
        role: RoleDesk,
        desk: RouterDesk,
        events: KvEvents | None,
        prefixes: PrefixDesk | None,
    ) -> None:
        self._options = options
        self._secret = secret
        self._core = core
        self._leases = leases
        self._links = links
        self._receiver = receiver
        self._moves = moves
        self.role = role
        self._desk = desk
        self._events = events
        self._prefixes = prefixes

    def routes(self) -> list[Route]:
        """All routes except generation."""
        leases = self._leases
        posts: tuple[Route, ...] = (
            self._post("/pdctl/v1/leases/claim", LeaseCall, leases.claim, _holder),
            self._post("/pdctl/v1/leases/commit", LeaseCall, leases.commit, _holder),
            self._post("/pdctl/v1/leases/release", LeaseCall, leases.release),
            self._post("/pdctl/v1/leases/renew", RenewCall, leases.renew, _holder),
            self._post("/pdctl/v1/leases/revoke", RevokeCall, leases.revoke),
            self._post("/pdctl/v1/holders/release", HolderCall, leases.release_holder),
            self._post(ATTEMPTS_PATH, AttemptCall, leases.give_up),
            self._post("/pdctl/v1/offers", Offer, self._receiver.offer, _epoch),
            self._post("/pdctl/v1/moves", MoveCall, self._moves.move),
            self._post("/pdctl/v1/links", LinkCall, self._links.make),
            self._post("/pdctl/v1/role", RoleCall, self.role.take),
            self._post(SESSION_PATH, SessionCall, self._desk.take),
        )
        if (desk := self._prefixes) is not None:
            posts += (self._post(PIECES_PATH, BlocksCall, desk.pieces.told.after),)
            if (sharing := desk.sharing) is not None:
                posts += (
                    self._post("/pdctl/v1/neighbours", NeighboursCall, sharing.follower.meet),
                    self._post(BLOCKS_PATH, BlocksCall, desk.blocks.after),
                    self._post(PREFIX_PATH, PrefixCall, sharing.lending.lend, _holder),
                )
        distserve = DistServe(self._options, self._core, self._desk, lambda: self.role.role == "prefill")
        return [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/pdctl/v1/state", self._state),
            Route("/pdctl/v1/endpoint", self._endpoint),
            Route("/kv/blocks", self._blocks),
            *posts,
            *distserve.routes(),
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
        leases = self._leases.infos(ready.block_bytes if ready else 0)
        return EngineState(
            name=self._options.name,
            role=self.role.role,
            role_epoch=self.role.epoch,
            prefills=self.role.prefills + len(leases),
            answers=self.role.answers,
            epoch=self._options.epoch,
            blocks_total=ready.num_blocks if ready else 0,
            blocks_free=books.blocks_free,
            blocks_cached=books.blocks_idle,
            counters={
                "prefix_tokens": books.prefix_tokens,
                "prefix_hits": books.prefix_hits,
                "prompts_own": books.prompts_own,
                "prompts_received": books.prompts_received,
                "drafted": books.drafted,
                "accepted": books.accepted,
                **(self._prefixes.counts() if self._prefixes is not None else {}),
                **tier_counters(books.tiers),
                **{f"{AHEAD}{result}": count for result, count in books.asked_ahead.items()},
            },
            blocks_referenced=books.blocks_referenced,
            blocks_leased=books.blocks_leased,
            blocks_quarantined=books.blocks_quarantined,
            blocks_reserved=books.blocks_reserved,
            held_back=books.held_back,
            running=books.running,
            waiting=books.waiting,
            tokens_total=self._core.tokens_total,
            leases=leases,
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
            work=books.work,
            attention=ready.attention if ready else "",
            cuda_graphs=ready.graphs if ready else "",
        )

    async def _health(self, _: Request) -> Response:
        return Response(status_code=200 if self._core.ready else 503)

    async def _metrics(self, _: Request) -> Response:
        text = render_metrics(self.state(), self._leases, self._core.quarantined_block_seconds())
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _state(self, _: Request) -> Response:
        return answer(self.state())

    async def _endpoint(self, request: Request) -> Response:
        ready = self._core.ready
        if not self.is_internal(request.headers.get("authorization", "")):
            return refusal(ApiError(403, "only this service's own processes may read KV addresses"))
        if ready is None:
            return refusal(ApiError(503, "the model is still loading", "service_unavailable"))
        return answer(EndpointReply(self._options.epoch, self._core.endpoint))

    async def _blocks(self, _: Request) -> Response:
        if self._events is None:
            return refusal(ApiError(404, 'kv_events is "off" for this engine'))
        return answer(self._events.snapshot())

    def _post(
        self, path: str, kind: type[Call], act: Callable[[Call], Done], speaker: Callable[[Call], str] | None = None
    ) -> Route:
        """`speaker`: the holder or the epoch for which a call speaks, which must be of the caller's node. Ending leases
        is harmless: the reader prefills again."""

        def forbidden(request: Request, call: Call) -> ApiError | None:
            return claims_too_much(request.scope, speaker(call)) if speaker is not None else None

        return Route(path, Posted(kind, act, self._stranger, forbidden).answer, methods=["POST"])

    def _stranger(self, request: Request) -> ApiError | None:
        if self.is_internal(request.headers.get("authorization", "")):
            return None
        return ApiError(403, "only this service's own processes may use leases")


def _holder(call: LeaseCall | RenewCall | PrefixCall) -> str:
    return call.holder


def _epoch(call: Offer) -> str:
    return call.epoch


class Locked:
    """Serves only this service's own processes, except for health, which load balancers need."""

    def __init__(self, app: ASGIApp, control: Control) -> None:
        self._app = app
        self._control = control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            key = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            if not self._control.is_internal(key):
                message = "this engine serves its own service: ask the proxy, or set open = true under [[engines]]"
                await asgi.respond_error(send, ApiError(401, message, "authentication_error"))
                return
        await self._app(scope, receive, send)
