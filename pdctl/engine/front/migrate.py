"""The decode side of a hand-over at work: drives `migration.advance` with claims, pulls and commits."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import msgspec

from pdctl.engine.front.core_link import CoreLink, RequestEvent
from pdctl.engine.front.trace import Trace
from pdctl.engine.messages import Failed, Pull, Pulled, Reserved, Start
from pdctl.engine.migration import FINAL, Action, Event, Migration, Phase, advance
from pdctl.lean_http import Pool, Unreachable, header_lines
from pdctl.wire import HandOver, LeaseCall, LeaseReply, RenewCall, RenewReply

# A claim or commit that takes longer than this will be asked again or given up, seconds.
_CALL_S = 5.0
# Renewals per lease time: three may be lost before a lease ends.
_RENEWALS = 4
_MAX_PEERS = 256


class KvLost(Exception):
    """The KV did not arrive whole and certified; the prompt must be prefilled again."""


class Migrator:
    """All hand-overs that this engine is reading."""

    def __init__(self, holder: str, secret: str, core: CoreLink, trace: Trace) -> None:
        self.holder = holder
        self.bytes_total = 0
        self.seconds_total = 0.0
        self.hand_over_seconds_total = 0.0
        self.pulls_total = 0
        self.lost_total = 0
        self._headers = header_lines({"authorization": f"Bearer {secret}", "content-type": "application/json"})
        self._core = core
        self._trace = trace
        self._peers: dict[tuple[str, int], Pool] = {}
        self._claimed: dict[str, tuple[HandOver, asyncio.Queue[Event]]] = {}

    async def bring(
        self, request_id: str, hand_over: HandOver, events: asyncio.Queue[RequestEvent], deadline_s: float
    ) -> None:
        """Return when the KV is here, certified, and decoding has begun. Raises KvLost."""
        if hand_over.lease_id in self._claimed:
            # COMMIT certifies one reader's bytes; a second one here would be told ok for the first one's.
            raise KvLost(f"lease {hand_over.lease_id} is being read by another request here")
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        started = time.monotonic()
        run = _Run(self, request_id, hand_over, inbox)
        self._claimed[hand_over.lease_id] = (hand_over, inbox)
        try:
            async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as tasks:
                pump = tasks.create_task(_pump(events, inbox, run))
                claim = tasks.create_task(run.claim())
                await run.drive()
                pump.cancel()
                claim.cancel()
        except TimeoutError:
            await run.step(Event.DEADLINE)
        except asyncio.CancelledError:
            run.abandon()
            raise
        finally:
            self._claimed.pop(hand_over.lease_id, None)
        if run.state.phase is not Phase.DECODING:
            self.lost_total += 1
            raise KvLost(f"the KV of {hand_over.remote_engine_id} was lost ({run.state.reason}): {run.detail}")
        self.hand_over_seconds_total += time.monotonic() - started

    async def renew_forever(self) -> None:
        """Keep every lease alive that a request here still wants, one call per prefill engine."""
        while True:
            shortest = min((hand_over.lease_s for hand_over, _ in self._claimed.values()), default=4.0)
            await asyncio.sleep(min(1.0, shortest / _RENEWALS))
            groups: dict[tuple[str, int, str], list[str]] = {}
            for hand_over, _ in self._claimed.values():
                key = (hand_over.remote_host, hand_over.remote_port, hand_over.epoch)
                groups.setdefault(key, []).append(hand_over.lease_id)
            async with asyncio.TaskGroup() as tasks:
                for (host, port, epoch), leases in groups.items():
                    tasks.create_task(self._renew(host, port, RenewCall(leases, epoch, self.holder)))

    async def call(self, hand_over: HandOver, verb: str) -> LeaseReply:
        """One lease call to the prefill engine. Raises Unreachable."""
        body = msgspec.json.encode(LeaseCall(hand_over.lease_id, hand_over.epoch, self.holder))
        pool = self._peer(hand_over.remote_host, hand_over.remote_port)
        response = await pool.request("POST", f"/pdctl/v1/leases/{verb}", self._headers, body, _CALL_S)
        if response.status != 200:
            return LeaseReply(False, f"status {response.status}: {response.body[:200].decode(errors='replace')}")
        try:
            return msgspec.json.decode(response.body, type=LeaseReply)
        except msgspec.DecodeError as failure:
            return LeaseReply(False, f"an answer that is not a lease reply: {failure}")

    def close(self) -> None:
        """Close every connection."""
        for pool in self._peers.values():
            pool.close()

    async def _renew(self, host: str, port: int, call: RenewCall) -> None:
        # A renewal that does not arrive is what leases are for; the next one is a moment away.
        with suppress(Unreachable, msgspec.DecodeError):
            pool = self._peer(host, port)
            body = msgspec.json.encode(call)
            response = await pool.request("POST", "/pdctl/v1/leases/renew", self._headers, body, _CALL_S)
            gone = msgspec.json.decode(response.body, type=RenewReply).gone if response.status == 200 else []
            for lease_id in gone:
                known = self._claimed.get(lease_id)
                if known is not None:
                    self._trace.write("renewal_refused", lease_id)

    def _peer(self, host: str, port: int) -> Pool:
        if len(self._peers) >= _MAX_PEERS:
            self._peers.pop(next(iter(self._peers))).close()
        return self._peers.setdefault((host, port), Pool(host, port))


class _Run:
    """One hand-over: its state and the carrying out of its actions."""

    def __init__(self, migrator: Migrator, request_id: str, hand_over: HandOver, inbox: asyncio.Queue[Event]) -> None:
        self.state = Migration()
        self.detail = ""
        self.target_blocks: list[int] = []
        self._migrator = migrator
        self._request_id = request_id
        self._hand_over = hand_over
        self._inbox = inbox

    async def drive(self) -> None:
        while self.state.phase not in FINAL:
            await self.step(await self._inbox.get())

    async def step(self, event: Event) -> None:
        """One event through the state machine, its actions carried out in order."""
        self.state, actions = advance(self.state, event)
        self._migrator._trace.write(
            "advance",
            self._hand_over.lease_id,
            on=event.value,
            phase=self.state.phase.value,
            request=self._request_id,
        )
        for action in actions:
            await self._do(action)

    async def claim(self) -> None:
        """Claim the lease; runs beside the reservation of blocks."""
        try:
            reply = await self._migrator.call(self._hand_over, "claim")
        except Unreachable as failure:
            reply = LeaseReply(False, str(failure))
        if not reply.ok:
            self.detail = reply.reason
        self._inbox.put_nowait(Event.CLAIM_OK if reply.ok else Event.CLAIM_REFUSED)

    def abandon(self) -> None:
        """We are being cancelled: the core drops the blocks by itself; the lease's deadline frees the rest,
        unless the router, which cancelled us, releases it first."""
        self.state, _ = advance(self.state, Event.CANCELLED)

    def note(self, pulled: Pulled) -> None:
        """Count a finished pull."""
        self.detail = pulled.error
        if not pulled.error:
            self._migrator.bytes_total += pulled.bytes
            self._migrator.seconds_total += pulled.seconds
            self._migrator.pulls_total += 1

    async def _do(self, action: Action) -> None:
        core = self._migrator._core
        match action:
            case Action.READ:
                source = self._hand_over.remote_block_ids
                endpoint = self._hand_over.endpoint
                await core.send(Pull(self._request_id, endpoint, source, self.target_blocks))
            case Action.COMMIT:
                self._inbox.put_nowait(await self._commit())
            case Action.DECODE:
                await core.send(Start(self._request_id))
            case Action.RELEASE_LEASE:
                with suppress(Unreachable):
                    await self._migrator.call(self._hand_over, "release")
            case Action.DROP_BLOCKS:
                core.abort(self._request_id)

    async def _commit(self) -> Event:
        try:
            reply = await self._migrator.call(self._hand_over, "commit")
        except Unreachable as failure:
            self.detail = str(failure)
            return Event.COMMIT_UNANSWERED
        if not reply.ok:
            self.detail = reply.reason
        return Event.COMMIT_OK if reply.ok else Event.COMMIT_REFUSED


async def _pump(events: asyncio.Queue[RequestEvent], inbox: asyncio.Queue[Event], run: _Run) -> None:
    """Core events to migration events, until the migration is decided."""
    while True:
        match event := await events.get():
            case Reserved():
                run.target_blocks = event.block_ids
                inbox.put_nowait(Event.RESERVED)
            case Pulled():
                run.note(event)
                inbox.put_nowait(Event.READ_FAILED if event.error else Event.READ_OK)
            case Failed():
                run.detail = event.reason
                inbox.put_nowait(Event.READ_FAILED)
            case _:
                raise AssertionError(f"a token before the KV: {event}")
