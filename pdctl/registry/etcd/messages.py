"""The messages of etcd's JSON gateway: bytes are base64, 64-bit numbers are strings, and zeros are left out.

Source: etcd's rpc.proto and the protobuf JSON mapping. Pure.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import msgspec

from pdctl.registry import Change, Created, Delete, Entry, Listing, Modified, Put

Message: TypeAlias = "dict[str, str | bool | Message | list[Message]]"
Answer = TypeVar("Answer", bound=msgspec.Struct)


class Header(msgspec.Struct):
    """On every answer: the revision of the store when it was given."""

    revision: int = 0


class KeyValue(msgspec.Struct):
    """A key as etcd has it; a deleted one has neither value nor `create_revision`."""

    key: str
    value: str = ""
    create_revision: int = 0
    mod_revision: int = 0
    lease: int = 0

    def entry(self) -> Entry:
        """The same as an Entry."""
        return Entry(_text(self.key), b64decode(self.value), self.create_revision, self.mod_revision, self.lease)


class RangeAnswer(msgspec.Struct):
    """Answer to `/v3/kv/range`."""

    header: Header
    kvs: list[KeyValue] = []

    def listing(self) -> Listing:
        """The same as a Listing."""
        return Listing(tuple(kv.entry() for kv in self.kvs), self.header.revision)


class TransactionAnswer(msgspec.Struct):
    """Answer to `/v3/kv/txn`. `succeeded` is whether the conditions held."""

    header: Header
    succeeded: bool = False


class GrantAnswer(msgspec.Struct):
    """Answer to `/v3/lease/grant`."""

    ID: int


class KeepAliveResult(msgspec.Struct):
    """`TTL` is 0 for a lease that has ended."""

    TTL: int = 0


class KeepAliveAnswer(msgspec.Struct):
    """Answer to `/v3/lease/keepalive`."""

    result: KeepAliveResult


class Empty(msgspec.Struct):
    """An answer of which nothing is used."""


class TokenAnswer(msgspec.Struct):
    """Answer to `/v3/auth/authenticate`."""

    token: str


class Failure(msgspec.Struct):
    """An error; `code` is gRPC's."""

    code: int = 0
    message: str = ""


class Event(msgspec.Struct):
    """A change of one key. A put has no type."""

    kv: KeyValue
    type: str = "PUT"

    def change(self) -> Change:
        """The same as a Change."""
        entry = None if self.type == "DELETE" else self.kv.entry()
        return Change(_text(self.kv.key), entry, self.kv.mod_revision)


class WatchResult(msgspec.Struct):
    """One message of a watch: events in the order of their revisions, none for a sign of life. etcd answers 200 also
    when it refuses: `canceled` with its reason."""

    header: Header = msgspec.field(default_factory=Header)
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: list[Event] = []

    def groups(self) -> list[tuple[Change, ...]]:
        """The changes, those of one revision together."""
        by_revision: dict[int, list[Change]] = {}
        for event in self.events:
            by_revision.setdefault(event.kv.mod_revision, []).append(event.change())
        return [tuple(changes) for _revision, changes in sorted(by_revision.items())]


class WatchAnswer(msgspec.Struct):
    """One line of the answer to `/v3/watch`."""

    result: WatchResult | None = None
    error: Failure | None = None


def range_request(prefix: str) -> Message:
    """All keys under `prefix`, as of now: answered by a majority, not by a member that lags behind."""
    return {"key": _b64(prefix), "range_end": _range_end(prefix), "sort_target": "KEY", "sort_order": "ASCEND"}


def transaction_request(writes: Sequence[Put | Delete], conditions: Sequence[Created | Modified]) -> Message:
    """All writes if all conditions hold."""
    return {"compare": [_compare(condition) for condition in conditions], "success": [_operation(w) for w in writes]}


def watch_request(prefix: str, after: int) -> Message:
    """Changes under `prefix` since `after`, and signs of life."""
    create: Message = {"key": _b64(prefix), "range_end": _range_end(prefix), "start_revision": str(after + 1)}
    return {"create_request": create | {"progress_notify": True}}


def decoded(body: bytes, kind: type[Answer]) -> Answer:
    """Raises msgspec.DecodeError or UnicodeDecodeError for something else."""
    return msgspec.json.decode(body, type=kind, strict=False)


def _compare(condition: Created | Modified) -> Message:
    revision = str(condition.revision)
    if isinstance(condition, Created):
        return {"key": _b64(condition.key), "target": "CREATE", "result": "EQUAL", "create_revision": revision}
    return {"key": _b64(condition.key), "target": "MOD", "result": "EQUAL", "mod_revision": revision}


def _operation(write: Put | Delete) -> Message:
    if isinstance(write, Delete):
        return {"request_delete_range": {"key": _b64(write.key)}}
    value = b64encode(write.value).decode()
    return {"request_put": {"key": _b64(write.key), "value": value, "lease": str(write.lease)}}


def _b64(key: str) -> str:
    return b64encode(key.encode()).decode()


def _text(key: str) -> str:
    return b64decode(key).decode(errors="replace")


def _range_end(prefix: str) -> str:
    """The first key after all that begin with `prefix`: its last byte plus one."""
    last = prefix.encode()
    assert last, "a prefix is not empty"
    assert last[-1] < 0xFF, "UTF-8 has no such byte"
    return b64encode(last[:-1] + bytes([last[-1] + 1])).decode()
