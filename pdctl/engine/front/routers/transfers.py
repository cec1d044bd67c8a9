"""What a request asks of KV transfer, and whether its sender may ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import msgspec

from pdctl.engine.front.routers.seal import Seal
from pdctl.net.openai.api import ApiError
from pdctl.net.openai.fields import ChatBody, CompletionBody, HoldRequest, MigrationRequest, OfferTo, is_lmdeploys
from pdctl.wire import HandOver

_T = TypeVar("_T")

_NULL = b"null"


class Router(Enum):
    """Who calls: this service's proxy, or a router of another project. The value is its name as a lease's holder."""

    OURS = "router"
    VLLM = "vllm-router"
    LMDEPLOY = "lmdeploy-proxy"


@dataclass(frozen=True, slots=True)
class Transfer:
    """`hold`: prefill, and keep the KV. `hand_over`, or `migration`, which leads to one: continue with a peer's KV."""

    router: Router = Router.OURS
    hold: bool = False
    offer_to: OfferTo | None = None
    hand_over: HandOver | None = None
    migration: MigrationRequest | None = None


class _Carried(msgspec.Struct):
    """The fields of a refused request that may lead to a lease."""

    kv_transfer_params: msgspec.Raw = msgspec.Raw(_NULL)
    migration_request: msgspec.Raw = msgspec.Raw(_NULL)


class Transfers:
    """Reads the fields about KV transfer. `is_open`: the engine serves routers without the run's secret."""

    def __init__(self, seal: Seal, is_open: bool) -> None:
        self._seal = seal
        self._is_open = is_open

    def of(self, body: CompletionBody | ChatBody, is_internal: bool) -> Transfer:
        """What a checked body asks for. Raises ApiError."""
        if is_lmdeploys(body):
            return self._of_lmdeploy(body, is_internal)
        if bytes(body.kv_transfer_params) == _NULL:
            return Transfer()
        if is_internal:
            return _ours(body.kv_transfer_params)
        if not self._is_open:
            raise ApiError(403, "only this service's own processes may send kv_transfer_params")
        return self._of_vllm(body.kv_transfer_params)

    def carried(self, body: bytes) -> Transfer:
        """What another router's refused request may have left at a prefill engine, as far as that can be read."""
        try:
            found = msgspec.json.decode(body, type=_Carried)
            if bytes(found.migration_request) != _NULL:
                migration = msgspec.json.decode(found.migration_request, type=MigrationRequest)
                return Transfer(Router.LMDEPLOY, migration=migration)
            if self._is_open and bytes(found.kv_transfer_params) != _NULL:
                return self._of_vllm(found.kv_transfer_params)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ApiError):
            pass
        return Transfer()

    def _of_lmdeploy(self, body: CompletionBody | ChatBody, is_internal: bool) -> Transfer:
        if not self._is_open and not is_internal:
            raise ApiError(
                403, "with_cache and migration_request need open = true under [[engines]], or the run's secret"
            )
        migration = body.migration_request
        if migration is None:
            return Transfer(Router.LMDEPLOY, hold=True)
        if migration.is_dummy_prefill:
            message = "a dummy prefill has no KV: start lmdeploy's proxy without --dummy-prefill"
            raise ApiError(400, message, param="migration_request")
        return Transfer(Router.LMDEPLOY, migration=migration)

    def _of_vllm(self, params: msgspec.Raw) -> Transfer:
        asked = _decoded(params, HoldRequest)
        if asked.do_remote_decode or not asked.do_remote_prefill:
            # A router's `offer_to` would have this engine call any address with the run's secret.
            return Transfer(Router.VLLM, hold=asked.do_remote_decode)
        hand_over = _decoded(params, HandOver)
        if not self._seal.is_genuine(hand_over):
            message = "these kv_transfer_params were not made by an engine of this service, or were changed on the way"
            raise ApiError(403, message, param="kv_transfer_params")
        return Transfer(Router.VLLM, hand_over=hand_over)


def _ours(params: msgspec.Raw) -> Transfer:
    asked = _decoded(params, HoldRequest)
    if asked.do_remote_decode:
        return Transfer(hold=True, offer_to=asked.offer_to)
    return Transfer(hand_over=_decoded(params, HandOver))


def _decoded(params: msgspec.Raw, kind: type[_T]) -> _T:
    """Raises ApiError."""
    try:
        return msgspec.json.decode(params, type=kind)
    except msgspec.DecodeError as failure:
        raise ApiError(400, f"kv_transfer_params are malformed: {failure}", param="kv_transfer_params") from None
