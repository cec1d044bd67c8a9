"""The endpoints that LMDeploy's proxy needs at an engine: GET /distserve/engine_info and four POSTs.

An engine of LMDeploy opens a ZMQ socket for each peer, on which decode engines free what they have read. Here a COMMIT
does this, over the links that the supervisor makes, so connecting and disconnecting a pair has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.posted import Posted, answer, refusal
from pdctl.engine.front.routers.desk import RouterDesk
from pdctl.engine.options import EngineOptions
from pdctl.net.openai.api import ApiError

# LMDeploy's DistServeConnectionStatus.
_SUCCESS, _FAIL = 1, 2


class _EngineInfo(msgspec.Struct, frozen=True):
    """LMDeploy's DistServeEngineConfig."""

    block_size: int
    num_gpu_blocks: int
    num_cpu_blocks: int = 0
    tp_size: int = 1
    ep_size: int = 1
    dp_size: int = 1
    pp_size: int | None = None
    dp_rank: int = 0


class _Initialize(msgspec.Struct, frozen=True):
    remote_engine_id: str
    protocol: int


class _ZmqAddress(msgspec.Struct, frozen=True):
    zmq_address: str = ""


class _Endpoint(msgspec.Struct, frozen=True):
    protocol: int
    endpoint_info: str = "{}"


class _Initialized(msgspec.Struct, frozen=True):
    kvtransfer_endpoint_info: list[_Endpoint]
    engine_endpoint_info: _ZmqAddress = _ZmqAddress()
    status: int = _SUCCESS


class _Connect(msgspec.Struct, frozen=True):
    remote_engine_id: str


class _Connected(msgspec.Struct, frozen=True):
    status: int


class _Drop(msgspec.Struct, frozen=True):
    engine_id: str
    remote_engine_id: str


class _Dropped(msgspec.Struct, frozen=True):
    success: bool = True


class _Free(msgspec.Struct, frozen=True):
    remote_session_id: int


class _Freed(msgspec.Struct, frozen=True):
    status: str = "SUCCESS"


class DistServe:
    """The endpoints. Who may call them is decided before: see `open` under [[engines]]."""

    def __init__(
        self, options: EngineOptions, core: CoreClient, desk: RouterDesk, is_prefill: Callable[[], bool]
    ) -> None:
        self._options = options
        self._core = core
        self._desk = desk
        self._is_prefill = is_prefill

    def routes(self) -> list[Route]:
        """All routes below /distserve."""
        return [
            Route("/distserve/engine_info", self._engine_info),
            Route("/distserve/p2p_initialize", Posted(_Initialize, _initialize).answer, methods=["POST"]),
            Route("/distserve/p2p_connect", Posted(_Connect, self._connect).answer, methods=["POST"]),
            Route("/distserve/p2p_drop_connect", Posted(_Drop, _drop).answer, methods=["POST"]),
            Route("/distserve/free_cache", Posted(_Free, self._free).answer, methods=["POST"]),
        ]

    async def _engine_info(self, _: Request) -> Response:
        ready = self._core.ready
        if ready is None:
            return refusal(ApiError(503, "the model is still loading", "service_unavailable"))
        info = msgspec.json.encode(_EngineInfo(self._options.block_size, ready.num_blocks))
        # The proxy expects a JSON string that contains JSON.
        return answer(info.decode())

    async def _connect(self, call: _Connect) -> _Connected:
        # Links lead from decode to prefill: a prefill engine knows no decode engine before that claims a lease.
        known = self._is_prefill() or await self._desk.peer_at(call.remote_engine_id) is not None
        return _Connected(_SUCCESS if known else _FAIL)

    async def _free(self, call: _Free) -> _Freed:
        self._desk.free(call.remote_session_id)
        return _Freed()


async def _initialize(call: _Initialize) -> _Initialized:
    return _Initialized([_Endpoint(call.protocol)])


async def _drop(_: _Drop) -> _Dropped:
    return _Dropped()
