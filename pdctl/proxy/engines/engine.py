"""The proxy's view of one engine: whether it is reachable, its running calls, its pending work and its speed."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from pdctl.adapters import Condition, Dialect, dialect
from pdctl.errors import PdctlError
from pdctl.net.http_client import ConnectionPool, Exchange, header_lines
from pdctl.net.identity import ContextFactory
from pdctl.proxy.engines.breaker import Breaker
from pdctl.proxy.engines.kv_room import KvRoom
from pdctl.proxy.engines.load import LoadMeter, Window
from pdctl.proxy.engines.prefixes.known import KnownPrefixes
from pdctl.proxy.engines.prefixes.places import Places
from pdctl.proxy_wire import EngineAddress
from pdctl.user_files import read_user_text
from pdctl.wire import ROLE_EPOCH_HEADER

# An engine is stuck if all its streams wait for this multiple of its usual gap between tokens, within these limits.
_STALL_GAPS = 50
_STALL_S = (5.0, 60.0)
# Calls that fail within this time count as one failure, seconds.
_ONE_FAILURE_S = 1.0
# Consecutive lost hand-overs after which a pair is not used for a while; that time, which grows with each further one,
# and the longest, in seconds.
_PAIR_LOSSES = 3
_PAIR_PAUSE_S, _LONGEST_PAIR_PAUSE_S = 5.0, 60.0
# Durations of answered calls that are kept, as many as LMDeploy's proxy keeps.
_CALLS_KEPT = 15
# Weight of the newest hand-over in their usual time.
_NEWEST = 0.2


@dataclass(slots=True, eq=False)
class Ticket:
    """One call to an engine. `patience_s`: its timeout without data; `streaming`: tokens have arrived.

    `source`: the prefill engine that has its KV, "" if none; `kv_lost`: it was cut because that engine is gone.
    `attempt`: its name for the engine; `target`: the engine that its stream is to move to, asked for at `move_at`.
    """

    exchange: Exchange
    patience_s: float
    streaming: bool = False
    source: str = ""
    kv_lost: bool = False
    attempt: str = ""
    target: str = ""
    move_at: float = 0.0


@dataclass(slots=True, eq=False)
class Engine:
    """One engine. Prompts are measured in request bytes, decode work in streams.

    `heard_at`: time of its last token; `answered_at`: when the last answered probe was sent; `stalls`: how often it
    counted as stuck without having died. Then it is slow, and cutting its calls only adds load: the limit doubles.
    `unlinked`: prefill engines from which it cannot read, as the supervisor says; `room`: for KV, of a prefill engine
    that does not protect it; `handing_over`: requests between their prefill call and the end of their hand-over.
    `headers`: lines of every call, of which `key` authorizes it. `hand_over_s`: usual time from the end of a prefill to
    its own first token, 0 if unknown. `moving`: its streams are to go on at other engines.
    `took_s`: durations of the last answered calls, for those who look; routing uses the windows.
    """

    address: EngineAddress
    client: ConnectionPool
    dialect: Dialect
    index: int
    headers: bytes
    healthy: bool = False
    draining: bool = False
    condition: Condition = field(default_factory=lambda: Condition(usable=False))
    breaker: Breaker = field(default_factory=Breaker)
    prompts: LoadMeter = field(default_factory=LoadMeter)
    streams: LoadMeter = field(default_factory=LoadMeter)
    prefill_s: Window = field(default_factory=Window)
    token_s: Window = field(default_factory=Window)
    prefixes: KnownPrefixes = field(default_factory=KnownPrefixes)
    pair_losses: dict[str, tuple[int, float]] = field(default_factory=dict)
    tickets: set[Ticket] = field(default_factory=set)
    heard_at: float = 0.0
    answered_at: float = 0.0
    gap_s: float = 0.0
    misses: int = 0
    stalls: int = 0
    lives: int = 0
    crowd: tuple[float, int] = (0.0, 0)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    unlinked: frozenset[str] = frozenset()
    room: KvRoom | None = None
    handing_over: int = 0
    hand_over_s: float = 0.0
    key: bytes = b""
    moving: bool = False
    took_s: deque[float] = field(default_factory=lambda: deque(maxlen=_CALLS_KEPT))

    @classmethod
    def of(
        cls, address: EngineAddress, secret: str, tls: ContextFactory | None = None, places: Places | None = None
    ) -> Engine:
        """An engine with the run's secret, or its own. `tls`: for engines that want certificates; `places`: what all
        engines know of prompts' tokens. Raises PdctlError for an unreadable secret."""
        assert tls is not None or not address.tls, f"{address.name} wants certificates, and this proxy has none"
        client = ConnectionPool(address.host, address.port, tls=tls if address.tls else None)
        speaks = dialect(address.kind, address.connector)
        key = _authorization(address, secret)
        prefixes = KnownPrefixes(places)
        return cls(address, client, speaks, address.slot, key + _epoch(address), key=key, prefixes=prefixes)

    def follow(self, address: EngineAddress) -> None:
        """The same engine may have another role by now."""
        self.address, self.headers = address, self.key + _epoch(address)

    @property
    def name(self) -> str:
        """The engine's name in the topology."""
        return self.address.name

    def usable(self, now: float) -> bool:
        """Whether a new request may be sent here."""
        return self.healthy and not self.draining and self.breaker.allows(now)

    def lost_peers(self, now: float) -> frozenset[str]:
        """Prefill engines from which this engine cannot read KV: it reports so, or hand-overs have failed."""
        known = self.condition.lost_peers | self.unlinked if self.unlinked else self.condition.lost_peers
        if not self.pair_losses:
            return known
        observed = {
            name
            for name, (count, at) in self.pair_losses.items()
            if count >= _PAIR_LOSSES
            and now - at < min(_LONGEST_PAIR_PAUSE_S, _PAIR_PAUSE_S * (count - _PAIR_LOSSES + 1))
        }
        return known | observed

    def handed_over(self, prefill: str, began: float, now: float, good: bool) -> None:
        """A hand-over from `prefill` succeeded or was lost. Those that had begun when another one was lost count as one
        with it: a machine that stood still loses all that it had."""
        count, at = self.pair_losses.get(prefill, (0, -math.inf))
        if good:
            self.pair_losses.pop(prefill, None)
        elif began >= at:
            self.pair_losses[prefill] = (count + 1, now)

    def took_over(self, seconds: float) -> None:
        """Record the time from the end of a prefill to the first token here."""
        self.hand_over_s += (_NEWEST if self.hand_over_s else 1.0) * (seconds - self.hand_over_s)

    def paced(self, gap_s: float) -> None:
        """Record a stream's mean gap between tokens."""
        self.stalls = max(0, self.stalls - 1)
        self.gap_s += 0.1 * (gap_s - self.gap_s)

    def renewed(self) -> None:
        """The process was restarted, or is back after being lost: reset its speed and failures."""
        self.lives += 1
        self.stalls = 0
        self.breaker.reset()
        self.prefill_s.clear()
        self.token_s.clear()
        self.prefixes.clear()
        self.pair_losses.clear()
        self.hand_over_s = 0.0
        self.took_s.clear()

    def forget_what_is_old(self, now: float) -> None:
        """What was measured long ago is unknown: an engine that was slow may be fast by now."""
        if self.prompts.is_old(now):
            self.prompts.forget()
            self.prefill_s.clear()
        if self.streams.is_old(now):
            self.streams.forget()
            self.token_s.clear()

    def others_at_failure(self) -> int:
        """The number of other calls when the process failed, as counted by the first call that ended."""
        now = time.monotonic()
        if now - self.crowd[0] > _ONE_FAILURE_S:
            self.crowd = (now, len(self.tickets))
        return self.crowd[1]

    def has_died_since(self, life: int) -> bool:
        """Whether the process with this life number is gone or does not answer."""
        return self.lives != life or not self.healthy

    def cut(self, reason: str) -> None:
        """End every running call."""
        for ticket in tuple(self.tickets):
            ticket.exchange.cut(reason)

    def cut_waiting(self, source: str) -> None:
        """End the calls that wait for KV of a prefill engine that does not have it any more."""
        for ticket in tuple(self.tickets):
            if ticket.source == source and not ticket.streaming:
                ticket.kv_lost = True
                ticket.exchange.cut(f"{self.name} was waiting for KV of {source}, which is gone")

    def stuck_s(self, now: float, awake_since: float = 0.0) -> float | None:
        """Seconds without a token on any of its streams, if that is too long; else None. `awake_since`: before that,
        this process could have heard nothing."""
        limit = min(max(_STALL_S[0], _STALL_GAPS * self.gap_s) * 2 ** min(self.stalls, 8), _STALL_S[1])
        since = [ticket.exchange.waiting_since for ticket in self.tickets if ticket.streaming]
        waiting = [at for at in since if at]
        if not waiting:
            return None
        silent = now - max(self.heard_at, min(waiting), awake_since)
        return silent if silent > limit else None


def _epoch(address: EngineAddress) -> bytes:
    return b"%b: %d\r\n" % (ROLE_EPOCH_HEADER.encode(), address.role_epoch) if address.role_epoch else b""


def _authorization(address: EngineAddress, secret: str) -> bytes:
    """The authorization header for an engine: with the run's secret, or an attached engine's."""
    if address.secret_file:
        try:
            secret = read_user_text(Path(address.secret_file)).strip()
        except OSError as failure:
            hint = "secret_file must be readable and contain the engine's secret or API key"
            raise PdctlError(f"{address.secret_file} cannot be read: {failure.strerror}", hint) from failure
    return header_lines({"authorization": f"Bearer {secret}"}) if secret else b""
