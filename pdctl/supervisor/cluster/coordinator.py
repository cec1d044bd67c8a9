"""Whoever holds the key `coordinator` places engines on nodes: it follows nodes and topology, and writes the orders.

Every agent runs one of these; all but one wait. The key lies under a lease of its own, and every write holds only while
the key is of this term: a coordinator that was asleep changes nothing. Its death costs one lease, and no stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Never

import msgspec

from pdctl.errors import ConfigError, PdctlError, first_of
from pdctl.host.facts import decode_facts
from pdctl.plan.cluster import room_of, wishes_of
from pdctl.plan.placement import Room
from pdctl.registry import Change, Created, Entry, LeaseGone, Put, Registry, Unavailable
from pdctl.registry.fence import Fence, NotOurs
from pdctl.registry.mirror import Mirror, follow, pause_s
from pdctl.supervisor.cluster.assignments import Assignments, Wanted, orders_of
from pdctl.supervisor.cluster.entries import WITHDRAWN, Keys, NodeEntry, Order, PlacementEntry, TopologyEntry
from pdctl.topology.loader import parse_text
from pdctl.topology.spec import Cluster

# Of a lease's time: between two renewals, and the longest wait before a key that is free is taken: the first one wins.
_KEEP_PART, _TAKE_PART = 1 / 3, 0.2
# Nodes that come together are placed together.
_SETTLE_S = 0.3
# Of one write: etcd takes 128 keys and 1.5 MB.
_MOST_WRITES, _MOST_BYTES = 64, 500_000


class Coordinator:
    """`say` gets sentences for the journal; `told` None while the registry is heard, else why not."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        node: str,
        cluster: Cluster,
        say: Callable[[str], None],
        told: Callable[[str | None], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._keys = keys
        self._node = node
        self._cluster = cluster
        self._say = say
        self._told = told
        self._clock = clock
        self._news = asyncio.Event()
        self._mirror = Mirror()
        self._heard = False
        self._holder: Entry | None = None
        self._placement: PlacementEntry | None = None
        # What we wrote to take the key.
        self._own: Put | None = None
        self._has_left = False

    @property
    def placement(self) -> PlacementEntry | None:
        """What the coordinator, here or on another node, tells of the places; None: nobody has told anything yet."""
        return self._placement

    @property
    def holder(self) -> str | None:
        """The node whose agent coordinates; None: none does."""
        return self._holder.value.decode(errors="replace") if self._holder is not None else None

    async def run_forever(self) -> Never:
        """Coordinate whenever nobody else does, until cancelled. Raises Refused."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follow(self._registry, self._keys.coordinator, self._take, self._told, self._mirror))
            tasks.create_task(self._stand_forever())
        raise AssertionError("both tasks run for ever")

    async def leave(self) -> None:
        """Give the key up, for ever, so that another agent takes it at once. One try: the lease ends by itself."""
        self._has_left = True
        if self._own is not None:
            with contextlib.suppress(Unavailable):
                await self._registry.revoke(self._own.lease)
            self._own = None

    def _take(self, changes: tuple[Change, ...]) -> None:
        self._heard = True
        for change in changes:
            if change.key == self._keys.coordinator:
                self._holder = change.entry
            elif change.key == self._keys.placement:
                self._placement = _placement_of(change.entry)
        self._news.set()

    async def _stand_forever(self) -> Never:
        """Take the key when it is free, and coordinate as long as it is ours."""
        failures = 0
        while True:
            if self._has_left:
                # A task group whose tasks fail while it is cancelled tells of their failures alone: whoever cancelled
                # this task may do so in vain.
                raise asyncio.CancelledError
            while not self._is_free():
                self._news.clear()
                await self._news.wait()
            await asyncio.sleep(random.random() * self._cluster.ttl_s * _TAKE_PART)  # noqa: S311 - jitter, no secret
            if not self._is_free():
                continue
            try:
                term = await self._stand()
                failures = 0
                if term is not None:
                    self._say(f"this node coordinates the cluster (term {term})")
                    await self._coordinate(term)
            except (Unavailable, LeaseGone):
                failures += 1
            await asyncio.sleep(pause_s(failures, random.random()))  # noqa: S311 - jitter, no secret

    def _is_free(self) -> bool:
        return self._heard and self._holder is None

    async def _stand(self) -> int | None:
        """Try to take the key. Returns the term; None if another agent was quicker.

        If the answer is lost, the key may be ours: then it ends with its lease, which nobody renews.
        """
        lease = await self._registry.grant(self._cluster.ttl_s)
        put = Put(self._keys.coordinator, self._node.encode(), lease)
        term = await self._registry.write([put], [Created(self._keys.coordinator, 0)])
        if term is None:
            await self._registry.revoke(lease)
            return None
        self._own = put
        return term

    async def _coordinate(self, term: int) -> None:
        """Until the key is not ours any more."""
        assert self._own is not None
        why = ""
        try:
            listing = await self._registry.list(self._keys.desired)
            orders = orders_of(entry.value for entry in listing.entries)
            books = Assignments(term, self._node, self._cluster.node_lost_s, orders, self._clock())
            began = _Term(self._registry, self._keys, term, self._own, books, self._say, self._clock)
            await began.run(self._cluster.ttl_s)
        except* (LeaseGone, _Deposed) as group:
            why = str(first_of(group))
        except* Unavailable as group:
            why = f"the registry does not answer ({first_of(group)})"
        self._own = None
        self._say(f"this node does not coordinate the cluster any more: {why}")


class _Deposed(Exception):
    """The key is not ours any more."""


class _Term:
    """One term: the books, and the tasks that keep them and write what they decide."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        term: int,
        own: Put,
        books: Assignments,
        say: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._keys = keys
        self._lease = own.lease
        self._fence = Fence(registry, own, term, term)
        self._books = books
        self._say = say
        self._clock = clock
        self._news = asyncio.Event()
        # Nothing is decided while one of the two may be out of date.
        self._unheard = {keys.nodes, keys.topology}
        self._said: PlacementEntry | None = None

    async def run(self, ttl_s: float) -> Never:
        """Until the key is lost: raises LeaseGone, _Deposed or Refused, in a group."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_forever(ttl_s))
            tasks.create_task(self._follow_forever(self._keys.nodes, self._take_node))
            tasks.create_task(self._follow_forever(self._keys.topology, self._take_topology))
            tasks.create_task(self._decide_forever())
        raise AssertionError("all tasks run for ever")

    async def _keep_forever(self, ttl_s: float) -> Never:
        kept = self._clock()
        while True:
            await asyncio.sleep(ttl_s * _KEEP_PART)
            try:
                await self._registry.keep(self._lease)
                kept = self._clock()
            except Unavailable as failure:
                # etcd may have given the key to another agent by now.
                if self._clock() - kept > ttl_s:
                    raise _Deposed(f"the registry does not answer ({failure})") from failure

    async def _follow_forever(self, prefix: str, take: Callable[[Change], None]) -> Never:
        def told(failure: str | None) -> None:
            if failure is not None:
                self._unheard.add(prefix)

        def tell(changes: tuple[Change, ...]) -> None:
            for change in changes:
                take(change)
            self._unheard.discard(prefix)
            self._news.set()

        await follow(self._registry, prefix, tell, told)

    def _take_node(self, change: Change) -> None:
        name = change.key.removeprefix(self._keys.nodes)
        if change.entry is None:
            self._books.vanished(name, self._clock())
        else:
            self._books.is_there(name, room_of_node(change.entry.value))

    def _take_topology(self, change: Change) -> None:
        if change.key != self._keys.topology:
            return
        try:
            self._books.wants(wanted_of(change.entry.value) if change.entry is not None else None)
        except PdctlError as failure:
            self._books.cannot_read(failure)

    async def _decide_forever(self) -> Never:
        failures = 0
        while True:
            await self._until_news()
            if self._unheard:
                continue
            try:
                await self._decide()
                failures = 0
            except NotOurs as failure:
                raise _Deposed("another agent has taken over") from failure
            except Unavailable:
                await asyncio.sleep(pause_s(failures, random.random()))  # noqa: S311 - jitter, no secret
                failures += 1
                self._news.set()

    async def _until_news(self) -> None:
        due = self._books.next_loss(self._clock())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due is None else due - self._clock()):
                await self._news.wait()
        await asyncio.sleep(_SETTLE_S)
        self._news.clear()

    async def _decide(self) -> None:
        """Write what is to change. After a lost answer, first look at what is there."""
        placement_is_known = not self._fence.is_unsure
        if self._fence.is_unsure:
            listing = await self._fence.settle(self._keys.desired)
            self._books.wrote(orders_of(entry.value for entry in listing.entries))
        decision = self._books.decide(self._clock())
        for orders in _batches(decision.orders):
            await self._fence.write([Put(self._keys.order(order.node), msgspec.json.encode(order)) for order in orders])
            self._books.wrote(orders)
        if decision.placement != self._said or not placement_is_known:
            said = Put(self._keys.placement, msgspec.json.encode(decision.placement), self._lease)
            await self._fence.write([said])
            for sentence in _sentences(self._said, decision.placement):
                self._say(sentence)
            self._said = decision.placement


def wanted_of(value: bytes) -> Wanted | None:
    """The topology that the registry has, and what its engines need; None: it was withdrawn.

    Raises PdctlError if this version does not understand it.
    """
    try:
        entry = msgspec.json.decode(value, type=TopologyEntry)
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        hint = "use the same version of pdctl on all nodes"
        raise PdctlError(f"the topology in the registry is not readable: {failure}", hint) from failure
    if entry == WITHDRAWN:
        return None
    try:
        topology = parse_text(entry.text, entry.source)
    except ConfigError as failure:
        problem = failure.problems[0]
        where = f"{entry.source}:{problem.line}" if problem.line else entry.source
        raise PdctlError(f"{where}: {problem.key or 'topology'}: {problem.message}", problem.hint) from failure
    return Wanted(entry, tuple(wishes_of(topology)), topology.cluster)


def room_of_node(value: bytes) -> Room | None:
    """What a node has; None if this version does not understand what it tells."""
    try:
        entry = msgspec.json.decode(value, type=NodeEntry)
        return replace(room_of(decode_facts(bytes(entry.facts))), cell=entry.cell)
    except (msgspec.DecodeError, UnicodeDecodeError, PdctlError):
        return None


def _placement_of(entry: Entry | None) -> PlacementEntry | None:
    try:
        return msgspec.json.decode(entry.value, type=PlacementEntry) if entry is not None else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _batches(orders: Sequence[Order]) -> Iterator[list[Order]]:
    """Orders that fit in one write."""
    batch: list[Order] = []
    size = 0
    for order in orders:
        length = len(msgspec.json.encode(order))
        if batch and (len(batch) == _MOST_WRITES or size + length > _MOST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(order)
        size += length
    if batch:
        yield batch


def _sentences(before: PlacementEntry | None, now: PlacementEntry) -> Iterator[str]:
    """What has changed, for the journal."""
    away, lost, problem = (before.away, before.lost, before.problem) if before is not None else ((), (), "")
    for node in now.away:
        if node not in away:
            yield f"the registry tells nothing of node {node}; it keeps its engines for now"
    for node in now.lost:
        if node not in lost:
            yield f"node {node} is lost: its engines are placed elsewhere"
    for node in {*away, *lost} - {*now.away, *now.lost}:
        yield f"node {node} is back"
    if now.problem != problem:
        yield now.problem or "all engines have a place"
