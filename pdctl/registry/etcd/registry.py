"""`Registry` by calls of the gateway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Never

from pdctl.registry import Behind, Change, Created, Delete, LeaseGone, Listing, Modified, Put, Refused, Unavailable
from pdctl.registry.etcd.gateway import Gateway, NotFound
from pdctl.registry.etcd.messages import (
    Empty,
    GrantAnswer,
    KeepAliveAnswer,
    RangeAnswer,
    TransactionAnswer,
    WatchAnswer,
    range_request,
    transaction_request,
    watch_request,
)

# gRPC's names of what the user can mend, in the reason with which a watch is cancelled.
_REFUSED = ("InvalidArgument", "PermissionDenied", "Unauthenticated")


class EtcdRegistry:
    """A `Registry`. `gateway` knows the members and how to sign in."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def grant(self, ttl_s: int) -> int:
        """As `Registry.grant`. A grant whose answer is lost ends by itself."""
        return (await self._gateway.call("/v3/lease/grant", {"TTL": str(ttl_s)}, GrantAnswer)).ID

    async def keep(self, lease: int) -> None:
        """As `Registry.keep`. etcd answers 200 with a TTL of 0 for a lease that has ended."""
        answer = await self._gateway.call("/v3/lease/keepalive", {"ID": str(lease)}, KeepAliveAnswer)
        if answer.result.TTL <= 0:
            raise LeaseGone(f"lease {lease:x} has ended")

    async def revoke(self, lease: int) -> None:
        """As `Registry.revoke`."""
        try:
            await self._gateway.call("/v3/lease/revoke", {"ID": str(lease)}, Empty)
        except NotFound:
            return

    async def write(self, writes: Sequence[Put | Delete], conditions: Sequence[Created | Modified] = ()) -> int | None:
        """As `Registry.write`."""
        message = transaction_request(writes, conditions)
        try:
            answer = await self._gateway.call("/v3/kv/txn", message, TransactionAnswer, repeat=not conditions)
        except NotFound as failure:
            raise LeaseGone(str(failure)) from failure
        return answer.header.revision if answer.succeeded else None

    async def list(self, prefix: str) -> Listing:
        """As `Registry.list`."""
        return (await self._gateway.call("/v3/kv/range", range_request(prefix), RangeAnswer)).listing()

    async def watch(self, prefix: str, after: int, tell: Callable[[tuple[Change, ...]], None]) -> Never:
        """As `Registry.watch`."""

        def each(answer: WatchAnswer) -> None:
            for group in _groups(answer):
                tell(group)

        await self._gateway.stream("/v3/watch", watch_request(prefix, after), each)

    async def close(self) -> None:
        """As `Registry.close`."""
        await self._gateway.close()


def _groups(answer: WatchAnswer) -> list[tuple[Change, ...]]:
    """The changes of one line. Raises Behind, Refused, Unavailable."""
    if answer.error is not None:
        raise Unavailable(f"etcd ended the watch: {answer.error.message}")
    if answer.result is None:
        return []
    if answer.result.compact_revision:
        raise Behind(f"etcd has forgotten what was before revision {answer.result.compact_revision}")
    if answer.result.canceled:
        reason = answer.result.cancel_reason
        if any(f"code = {code}" in reason for code in _REFUSED):
            raise Refused(f"etcd refuses the watch: {reason}", "check user, password and role of [cluster] in etcd")
        raise Unavailable(f"etcd ended the watch: {reason}")
    return answer.result.groups()
