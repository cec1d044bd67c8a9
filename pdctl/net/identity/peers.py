"""What a peer may say: its certificate speaks for the processes of its own node, of this service, and for no others.

In a cluster every epoch begins with the node's name (host/boot.py), and so every holder of leases says its node.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pdctl.net import asgi
from pdctl.net.identity import PEER, Who
from pdctl.net.openai.api import ApiError
from pdctl.wire import ROUTER_HEADER

_Scope = Mapping[str, Any]
_App = Callable[[Any, Any, Any], Awaitable[None]]


class NodesOnly:
    """Serves the nodes of a service, and lets each of them name only itself as the router that will hold leases."""

    def __init__(self, app: _App, service: str) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] == "http" and (failure := self._stranger(scope)) is not None:
            await asgi.respond_error(send, failure)
            return
        await self._app(scope, receive, send)

    def _stranger(self, scope: _Scope) -> ApiError | None:
        who: Who | None = scope.get(PEER)
        if who is None:
            return ApiError(403, "the certificate of this connection names no node of a service")
        if who.service != self._service:
            return ApiError(403, f"{who.node} is a node of service {who.service!r}, and this is {self._service!r}")
        # Each of them: whoever reads the header may take any one.
        holders = [value.decode("latin-1") for name, value in scope["headers"] if name == ROUTER_HEADER.encode()]
        return next((failure for holder in holders if holder and (failure := claims_too_much(scope, holder))), None)


def claims_too_much(scope: _Scope, holder: str) -> ApiError | None:
    """Why this peer may not speak for a holder (NAME@EPOCH) or an epoch; None if it may."""
    who: Who | None = scope.get(PEER)
    if who is None:
        return None
    node, is_of_node, _ = holder.rpartition("@")[2].partition("~")
    if is_of_node and node == who.node:
        return None
    of = f"node {node}" if is_of_node else "no node"
    return ApiError(403, f"the certificate of node {who.node} does not speak for {holder}, which is of {of}")
