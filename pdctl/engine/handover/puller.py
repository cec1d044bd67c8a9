"""Fetches KV from peers: threads that copy in parallel to the step loop, links to peers, and polling of late reads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pdctl.engine.cache.layout import mismatch
from pdctl.engine.cache.memory import NoMemory
from pdctl.engine.handover.pull_queue import PullQueue
from pdctl.engine.handover.reading import ShardReader, Way, way
from pdctl.engine.ipc.messages import Connect, Linked, Pull, Pulled
from pdctl.engine.lifeline import vital
from pdctl.engine.transfer import TransferError, TransferUncertain
from pdctl.engine.transfer.choice import Chosen, choose
from pdctl.transports import TRANSPORTS
from pdctl.wire import KvEndpoint, LinkInfo, Manifest

_log = logging.getLogger(__name__)

# Limit of threads: one per peer with a running pull, plus PullQueue's extra ones.
_MAX_THREADS = 64
# Interval at which an idle puller releases dead peers' memory and polls late reads, seconds.
_PRUNE_S = 2.0
_SETTLE_S = 0.05
_CLOSE_S = 1.0
# In addition to `read_s`, a read may take as long as its bytes take at this rate, bytes per second.
_SLOWEST = 50e6


@dataclass(frozen=True, slots=True)
class OurSide:
    """This engine's side of every transfer. `manifest`: of all its KV."""

    manifest: Manifest
    host_id: str
    backend: str
    read_s: float


class _Link(NamedTuple):
    """How a peer is read, and why."""

    chosen: Chosen
    way: Way


class Puller:
    """`report` is called from any thread with Pulled and Linked; `settled` with the id of a quarantined request."""

    def __init__(
        self,
        side: OurSide,
        reader: ShardReader,
        report: Callable[[Pulled | Linked], None],
        settled: Callable[[str], None],
    ) -> None:
        self._side = side
        self._reader = reader
        self._report = report
        self._settled = settled
        # A copy of mapped memory is never late, and two at once only compete for memory bandwidth.
        per_peer = max((TRANSPORTS[name].reads_per_peer for name in self._ours()), default=1)
        self._queue: PullQueue[Pull | Connect] = PullQueue(per_peer)
        self._links: dict[tuple[str, str], _Link] = {}
        self._late: dict[str, TransferUncertain] = {}
        self._condition = threading.Condition()
        self._wake_keeper = threading.Event()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closing = False
        self._keeper = threading.Thread(target=vital(self._keep_house), name="puller", daemon=True)
        self._keeper.start()

    def submit(self, work: Pull | Connect) -> None:
        """Queue work. Never blocks."""
        with self._condition:
            self._queue.push(work.peer, work)
            if self._idle < len(self._queue) and len(self._threads) < _MAX_THREADS:
                thread = threading.Thread(target=vital(self._work), name=f"transfer-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._condition.notify()

    def cancel(self, request_id: str) -> None:
        """Cancel a pull that has not started; a running one continues to its end."""
        with self._condition:
            dropped = self._queue.drop(lambda work: isinstance(work, Pull) and work.request_id == request_id)
        if dropped:
            self._report(Pulled(request_id, "the request is gone", 0.0, 0))

    def close(self) -> None:
        """Stop taking work and close the transports."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._wake_keeper.set()
        deadline = time.monotonic() + _CLOSE_S
        for thread in (self._keeper, *self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
        self._reader.close()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._idle += 1
                while (taken := self._queue.take()) is None and not self._closing:
                    self._condition.wait()
                self._idle -= 1
                if taken is None:
                    return
            peer, work = taken
            try:
                if isinstance(work, Connect):
                    self._report(self._connect(work))
                else:
                    self._pull(work)
            finally:
                with self._condition:
                    self._queue.done(peer)
                    self._condition.notify()

    def _connect(self, work: Connect) -> Linked:
        try:
            link, _ = self._chosen(work.peer, work.epoch, work.endpoint)
            self._reader.connect(link.way, work.endpoint.shards)
        except (TransferError, NoMemory, ValueError) as failure:
            return Linked(LinkInfo(work.peer, work.epoch, error=str(failure)))
        return _linked(work.peer, work.epoch, link.chosen)

    def _pull(self, pull: Pull) -> None:
        started = time.perf_counter()
        error, moved, late = "", 0, None
        try:
            moved = self._read(pull)
        except TransferUncertain as failure:
            error, late = str(failure), failure
        except (TransferError, NoMemory, ValueError) as failure:
            error = str(failure)
        seconds = time.perf_counter() - started
        self._report(Pulled(pull.request_id, error, seconds, moved, late is not None))
        if late is not None:
            # After the report: blocks must enter quarantine before they can leave it.
            with self._condition:
                self._late[pull.request_id] = late
            self._wake_keeper.set()

    def _read(self, pull: Pull) -> int:
        link, is_new = self._chosen(pull.peer, pull.epoch, pull.endpoint)
        if is_new:
            self._report(_linked(pull.peer, pull.epoch, link.chosen))
        return self._reader.read(link.way, pull, lambda num_bytes: self._side.read_s + num_bytes / _SLOWEST)

    def _chosen(self, peer: str, epoch: str, endpoint: KvEndpoint) -> tuple[_Link, bool]:
        """How to read a peer, chosen once per epoch, and whether it was chosen now. Raises ValueError if there is no
        way."""
        with self._condition:
            if known := self._links.get((peer, epoch)):
                return known, False
        if reason := mismatch(self._side.manifest, endpoint.manifest):
            raise ValueError(reason)
        link = self._link(endpoint)
        with self._condition:
            replaced = [link for key, link in self._links.items() if key[0] == peer]
            self._links = {key: link for key, link in self._links.items() if key[0] != peer}
            self._links[peer, epoch] = link
        for old in replaced:
            if old.way.addresses != link.way.addresses:
                self._reader.forget(old.way)
        return link, True

    def _link(self, endpoint: KvEndpoint) -> _Link:
        """One transport for all shards."""
        fallbacks = {name: transport.fallback for name, transport in self._reader.ours[0].transports.items()}
        side = self._side
        found = [choose(side.backend, side.host_id, self._ours(), fallbacks, pool) for pool in endpoint.shards]
        if len({chosen.transport for chosen in found}) > 1:
            raise ValueError("the peer's devices do not serve their KV by the same transport")
        addresses = [chosen.address for chosen in found]
        return _Link(found[0], way(found[0].transport, addresses, self._reader.ours, endpoint.shards))

    def _ours(self) -> dict[str, str]:
        """Our transports, the same for all shards, with their protocols."""
        return {name: transport.protocol for name, transport in self._reader.ours[0].transports.items()}

    def _keep_house(self) -> None:
        """Poll late reads; release memory of dead peers."""
        pruned = time.monotonic()
        while not self._closing:
            self._wake_keeper.wait(_SETTLE_S if self._late else _PRUNE_S)
            self._wake_keeper.clear()
            with self._condition:
                late = dict(self._late)
            for request_id, read in late.items():
                if read.settled():
                    with self._condition:
                        del self._late[request_id]
                    self._settled(request_id)
            if time.monotonic() - pruned >= _PRUNE_S:
                pruned = time.monotonic()
                for transport in self._reader.transports():
                    transport.prune()


def _linked(peer: str, epoch: str, chosen: Chosen) -> Linked:
    return Linked(LinkInfo(peer, epoch, chosen.transport, chosen.protocol, chosen.reason, chosen.fallback))
