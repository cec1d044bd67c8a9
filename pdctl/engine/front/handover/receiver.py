"""The decode side of a hand-over: drives `reception.advance` with claims, pulls and commits."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from pdctl.engine.front.core_client import CoreClient, Note, RequestEvent, RequestEvents
from pdctl.engine.front.handover.links import LinkBook
from pdctl.engine.front.handover.peers import LeaseRef, Peers, of_hand_over, of_offer
from pdctl.engine.front.handover.trace import Trace
from pdctl.engine.handover.reception import FINAL, Action, Phase, Reception, ReceptionEvent, advance
from pdctl.engine.ipc.messages import Failed, Keep, Pull, Pulled, Reserve, Reserved, Start, Submit
from pdctl.net.http_client import Unreachable
from pdctl.wire import HandOver, LeaseReply, Offer, RenewCall

# Renewals per lease time, so that three may be lost before a lease ends. At least one per second, so that `pdctl kv`
# can distinguish a living holder from a dead one.
_RENEWALS = 4
_LONGEST_PAUSE_S = 1.0
_MAX_EARLY = 256
_MAX_ENDED = 4096
# An offered prefill that is never handed over is given up after this, seconds.
_EARLY_S = 600.0


class KvLost(Exception):
    """The KV did not arrive completely or was not committed; the prompt must be prefilled again."""


@dataclass(slots=True)
class Totals:
    """Counts since the start, for metrics. A hand-over takes one pull, plus one per chunk read early."""

    hand_overs: int = 0
    pulls: int = 0
    bytes: int = 0
    seconds: float = 0.0
    lost: int = 0
    early: int = 0
    hand_over_seconds: float = 0.0


class Receiver:
    """All hand-overs that this engine is reading."""

    def __init__(self, peers: Peers, core: CoreClient, links: LinkBook, trace: Trace, tasks: asyncio.TaskGroup) -> None:
        self.totals = Totals()
        self._peers = peers
        self._core = core
        self._links = links
        self._trace = trace
        self._tasks = tasks
        self._runs: dict[str, _Run] = {}
        self._renewing: set[tuple[str, int, str]] = set()
        # An offer may arrive after its lease has ended here, and must not start it again.
        self._ended: OrderedDict[str, None] = OrderedDict()

    @asynccontextmanager
    async def decoding(
        self, submit: Submit, given: HandOver, deadline_s: float, stages: dict[str, float]
    ) -> AsyncIterator[tuple[str, RequestEvents]]:
        """Enter when the KV is here and committed and decoding has begun; gives the request's id in the core and its
        events.

        `stages` receives the seconds for admission and for the transfer, and the bytes. Raises KvLost. Leaving frees
        what the request holds here.
        """
        started = time.monotonic()
        run = self._taken(of_hand_over(given), submit.request_id)
        try:
            async with self._core.request(msgspec.structs.replace(submit, request_id=run.core_id)) as events:
                await self._bring(run, submit.kv_tokens, deadline_s)
                self.totals.hand_overs += 1
                now = time.monotonic()
                self.totals.hand_over_seconds += now - started
                # Blocks reserved for an offer were there before the request.
                admitted = max(started, run.reserved_at)
                stages |= {"admission": admitted - started, "hand_over": now - admitted, "bytes": run.bytes}
                yield run.core_id, events
        finally:
            if run.state.phase not in FINAL:
                # Its client left, perhaps before the core was told of it. The core drops the blocks by itself.
                run.state, _ = advance(run.state, ReceptionEvent.CANCELLED)
                self._peers.release_later(run.lease)
            self._end(given.lease_id)

    async def fetch(self, offer: Offer, token_ids: list[int], salt: str, deadline_s: float) -> None:
        """Bring KV here that a peer has lent, for whoever asks for it next. Raises KvLost."""
        run = self._taken(of_offer(offer), f"kv.{offer.lease_id}")
        run.keeps = True
        try:
            await self._core.send(Reserve(run.core_id, offer.num_tokens, token_ids, salt, only_now=True))
            await self._bring(run, offer.num_tokens, deadline_s)
        finally:
            if run.state.phase not in FINAL:
                run.state, _ = advance(run.state, ReceptionEvent.CANCELLED)
                self._peers.release_later(run.lease)
                self._core.abort(run.core_id)
            self._core.keep(run.core_id)
            self._end(offer.lease_id)

    def offer(self, offer: Offer) -> LeaseReply:
        """Accept an offer: a prefill lets its first chunks be read while it computes the rest."""
        run = self._runs.get(offer.lease_id)
        if offer.withdrawn:
            if run is not None and run.early:
                run.post(ReceptionEvent.LEASE_GONE)
            elif run is None:
                self._end(offer.lease_id)
            return LeaseReply(True)
        if offer.lease_id in self._ended:
            return LeaseReply(False, f"lease {offer.lease_id} has ended here")
        if run is None:
            if sum(run.early for run in self._runs.values()) >= _MAX_EARLY:
                return LeaseReply(False, "too many hand-overs in progress here")
            run = self._new_run(of_offer(offer), f"kv.{offer.lease_id}")
            run.early = True
            run.let_go.clear()
            self._tasks.create_task(self._read_early(run, offer))
        if run.early and len(offer.block_ids) > len(run.lease.block_ids):
            # An answer's blocks are allocated one by one.
            run.lease = of_offer(offer)
        if offer.readable >= offer.num_tokens:
            # The request itself will arrive soon, unless its client disconnected.
            run.wanted_until = time.monotonic() + offer.lease_s
        run.post(ReceptionEvent.OFFERED, offer.readable)
        return LeaseReply(True)

    async def renew_forever(self) -> None:
        """Renew every lease that a request here still needs, with one call per prefill engine."""
        while True:
            shortest = min((run.lease.lease_s for run in self._runs.values()), default=4.0)
            await asyncio.sleep(min(_LONGEST_PAUSE_S, shortest / _RENEWALS))
            groups: dict[tuple[str, int, str], list[str]] = {}
            for run in self._runs.values():
                if run.state.phase in FINAL:
                    continue
                if run.early and time.monotonic() > run.wanted_until:
                    run.post(ReceptionEvent.LEASE_GONE, detail="its request did not arrive")
                    continue
                key = (run.lease.host, run.lease.port, run.lease.epoch)
                groups.setdefault(key, []).append(run.lease.lease_id)
            for key, leases in groups.items():
                # One call per peer at a time; calls to different peers run concurrently.
                if key not in self._renewing:
                    self._renewing.add(key)
                    self._tasks.create_task(self._renew(key, RenewCall(leases, key[2], self._peers.holder)))

    # -- parts ---------------------------------------------------------------------------------------------

    def _taken(self, lease: LeaseRef, request_id: str) -> _Run:
        """The run that an offer started, taken over; else a new one."""
        if lease.lease_id in self._ended:
            # A commit of the earlier read may still be on its way; it would confirm this read's bytes.
            self._peers.release_later(lease)
            raise KvLost(f"lease {lease.lease_id} has been read here before")
        run = self._runs.get(lease.lease_id)
        if run is None:
            return self._new_run(lease, request_id)
        if not run.early:
            # COMMIT confirms one reader's bytes; a second reader here would get the answer for the first.
            raise KvLost(f"lease {lease.lease_id} is being read by another request here")
        run.early, run.lease = False, lease
        run.post(ReceptionEvent.OFFERED)
        return run

    def _end(self, lease_id: str) -> None:
        self._runs.pop(lease_id, None)
        self._ended[lease_id] = None
        while len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)

    def _new_run(self, lease: LeaseRef, core_id: str) -> _Run:
        run = _Run(lease, core_id, self._core.open(core_id), time.monotonic())
        run.let_go.set()
        self._runs[lease.lease_id] = run
        self._tasks.create_task(self._claim(run))
        return run

    async def _bring(self, run: _Run, num_tokens: int, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                await run.let_go.wait()
                run.post(ReceptionEvent.SEALED, num_tokens)
                while run.state.phase not in FINAL:
                    await self._step(run, await run.inbox.get())
        except TimeoutError:
            await self._advance(run, ReceptionEvent.DEADLINE)
        if run.state.phase is not Phase.DECODING:
            self.totals.lost += not run.keeps
            raise KvLost(f"the KV of {run.lease.engine} was lost ({run.state.reason}): {run.detail}")

    async def _read_early(self, run: _Run, offer: Offer) -> None:
        """Read offered chunks until the request itself arrives and takes over, or the KV is lost."""
        try:
            if run.early:
                # Otherwise the request came first and has made its own reservation.
                known = offer.token_ids if len(offer.token_ids) == offer.num_tokens else []
                await self._core.send(Reserve(run.core_id, offer.num_tokens, known, offer.salt))
            async with asyncio.timeout(_EARLY_S):
                while run.state.phase not in FINAL and run.early:
                    await self._step(run, await run.inbox.get())
        except TimeoutError:
            await self._advance(run, ReceptionEvent.DEADLINE)
        finally:
            run.let_go.set()
            if run.early:
                # No request took over: remove everything.
                self._end(run.lease.lease_id)
                self._core.keep(run.core_id)
                self._core.abort(run.core_id)
            else:
                self.totals.early += 1

    async def _step(self, run: _Run, item: RequestEvent) -> None:
        """Convert a message of the core, or the result of a call, into a reception event."""
        match item:
            case Note(event, tokens, detail):
                run.detail = detail or run.detail
                await self._advance(run, event, tokens)
            case Reserved():
                run.target_blocks, run.reserved_at = item.block_ids, time.monotonic()
                await self._advance(run, ReceptionEvent.RESERVED, item.cached)
            case Pulled():
                self._count(run, item)
                await self._advance(run, ReceptionEvent.READ_FAILED if item.error else ReceptionEvent.READ_OK)
            case Failed():
                run.detail = item.reason
                await self._advance(run, ReceptionEvent.READ_FAILED)
            case _:
                raise AssertionError(f"a token before the KV: {item}")

    async def _advance(self, run: _Run, event: ReceptionEvent, tokens: int = 0) -> None:
        """Pass one event through the state machine and execute its actions in order."""
        run.state, actions = advance(run.state, event, tokens)
        phase = run.state.phase.value
        self._trace.write("advance", run.lease.lease_id, on=event.value, phase=phase, request=run.core_id)
        for action in actions:
            await self._do(run, action)

    async def _do(self, run: _Run, action: Action) -> None:
        match action:
            case Action.READ:
                await self._core.send(run.pull())
            case Action.COMMIT:
                event, detail = await self._commit(run)
                run.post(event, detail=detail)
            case Action.DECODE if run.keeps:
                await self._core.send(Keep(run.core_id, run.lease.endpoint.manifest.segment))
            case Action.DECODE:
                await self._core.send(Start(run.core_id))
            case Action.RELEASE_LEASE:
                self._peers.release_later(run.lease)
            case Action.DROP_BLOCKS:
                self._core.abort(run.core_id)

    async def _claim(self, run: _Run) -> None:
        """Claim the lease; runs beside the reservation of blocks."""
        try:
            reply = await self._peers.lease_call(run.lease, "claim")
        except Unreachable as failure:
            reply = LeaseReply(False, str(failure))
        run.renewed_at = time.monotonic()
        run.post(ReceptionEvent.CLAIM_OK if reply.ok else ReceptionEvent.CLAIM_REFUSED, detail=reply.reason)

    async def _commit(self, run: _Run) -> tuple[ReceptionEvent, str]:
        try:
            reply = await self._peers.lease_call(run.lease, "commit")
        except Unreachable as failure:
            return ReceptionEvent.COMMIT_UNANSWERED, str(failure)
        return (ReceptionEvent.COMMIT_OK if reply.ok else ReceptionEvent.COMMIT_REFUSED), reply.reason

    async def _renew(self, peer: tuple[str, int, str], call: RenewCall) -> None:
        try:
            gone = await self._peers.renew(peer[0], peer[1], call)
        except Unreachable:
            # The next renewal follows soon. A lease that was not renewed for its whole time has ended.
            now = time.monotonic()
            gone = [i for i in call.lease_ids if i in self._runs and self._runs[i].is_overdue(now)]
        else:
            for lease_id in set(call.lease_ids) - set(gone):
                if lease_id in self._runs:
                    self._runs[lease_id].renewed_at = time.monotonic()
        finally:
            self._renewing.discard(peer)
        for lease_id in gone:
            run = self._runs.get(lease_id)
            # A renewal may overtake the claim; then the claim's answer decides.
            if run is not None and run.state.claimed:
                self._trace.write("renewal_refused", lease_id)
                run.post(ReceptionEvent.LEASE_GONE, detail="its lease is gone")

    def _count(self, run: _Run, pulled: Pulled) -> None:
        run.detail = pulled.error
        if not pulled.error:
            run.bytes += pulled.bytes
            self.totals.bytes += pulled.bytes
            self.totals.seconds += pulled.seconds
            self.totals.pulls += 1
            self._links.pulled(run.lease.engine, pulled.bytes, pulled.seconds)


@dataclass(slots=True)
class _Run:
    """One hand-over in progress. `early`: started by an offer, before its request. `let_go`: no task drives it any
    more. `keeps`: no request decodes from it; its KV stays for later ones."""

    lease: LeaseRef
    core_id: str
    inbox: RequestEvents
    renewed_at: float
    state: Reception = field(default_factory=Reception)
    detail: str = ""
    target_blocks: list[int] = field(default_factory=list)
    reserved_at: float = 0.0
    bytes: int = 0
    early: bool = False
    keeps: bool = False
    wanted_until: float = float("inf")
    let_go: asyncio.Event = field(default_factory=asyncio.Event)

    def post(self, event: ReceptionEvent, tokens: int = 0, detail: str = "") -> None:
        self.inbox.put_nowait(Note(event, tokens, detail))

    def pull(self) -> Pull:
        lease, state = self.lease, self.state
        return Pull(
            self.core_id, lease.engine, lease.epoch, lease.endpoint, lease.block_ids, self.target_blocks,
            state.read, state.asked - state.read,
        )  # fmt: skip

    def is_overdue(self, now: float) -> bool:
        return now - self.renewed_at > self.lease.lease_s
