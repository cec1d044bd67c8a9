"""All engines of a proxy: probes, the end of stuck calls, and the data for routing and admission."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from pdctl.adapters import Condition
from pdctl.net.http_client import Unreachable
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.inline import Prospect, Why, is_better, prompts_s
from pdctl.proxy.engines.kv_room import KvRoom
from pdctl.proxy.engines.load import SharedLoads
from pdctl.proxy.engines.outlook import Outlook
from pdctl.proxy.engines.routing import EnginePair, Load, View
from pdctl.proxy_wire import EngineAddress

_log = logging.getLogger(__name__)

# Probe intervals of a healthy engine and of one that is down (shorter, so that a restarted engine is soon used),
# seconds.
_HEALTHY_S, _DOWN_S = 0.5, 0.1
_PROBE_TIMEOUT_S = 1.5
# Consecutive unanswered probes after which an engine is down: one slow answer on a busy machine is not enough.
_MISSES = 4
# Polling interval for an engine's proof of life, seconds, and its time limit in probe timeouts: it has time for the
# running probe, which proves nothing, and for the next one.
_PROOF_LOOK_S, _PROOF_PROBES = 0.02, 2.5
# Interval of checks for silent calls, seconds.
_WATCH_S = 0.1
# Seats and KV room are cached this long: they change only with probes, which are less frequent. Seconds.
_ROOM_S = 0.02
# Request bytes per prompt token, until answers have shown it, and the weight of the newest answer.
_BYTES_PER_TOKEN = 3.0
_NEWEST = 0.05


class EnginePool:
    """All engines, and the event that one has become available."""

    def __init__(self, engines: list[Engine], shared: SharedLoads | None = None, predicts: bool = False) -> None:
        self._predicts = predicts
        self.engines = engines
        self.by_name = {engine.name: engine for engine in engines}
        self.changed = asyncio.Event()
        self._shared = shared
        self._secret = ""
        self._tasks: asyncio.TaskGroup | None = None
        self._watches: dict[Engine, asyncio.Task[None]] = {}
        self._only = _only_pair(engines)
        self._inline = _inline(engines)
        # Tokens per byte of a request, as answered requests had.
        self._tokens_per_byte = 1 / _BYTES_PER_TOKEN
        self._known_fields: dict[str, frozenset[str] | None] = {}
        self._room: tuple[float, int | None, int | None] = (0.0, None, None)

    @classmethod
    def of(
        cls,
        addresses: Sequence[EngineAddress],
        secret: str = "",
        shared: SharedLoads | None = None,
        predicts: bool = False,
    ) -> EnginePool:
        """A pool without known healthy engines yet; `predicts`: outlooks include a predicted TTFT.

        Raises PdctlError for an unreadable secret.
        """
        found = cls([Engine.of(address, secret) for address in addresses], shared, predicts)
        found._secret = secret
        return found

    def follow(
        self,
        addresses: Sequence[EngineAddress],
        draining: Sequence[str],
        predicts: bool,
        unlinked: Mapping[str, Sequence[str]] | None = None,
        moving: Sequence[str] = (),
    ) -> None:
        """Use these engines from now on and cut calls to removed ones. Raises PdctlError without any change.

        `unlinked`: by decode engine, the prefill engines from which it cannot read; `moving`: engines whose streams go
        on elsewhere.
        """
        known = {engine.address.identity: engine for engine in self.engines}
        wanted = [known.get(address.identity) or Engine.of(address, self._secret) for address in addresses]
        for engine in [engine for engine in self.engines if engine not in wanted]:
            self._drop(engine)
        self.engines, self._predicts = wanted, predicts
        self.by_name = {engine.name: engine for engine in wanted}
        for engine, address in zip(wanted, addresses, strict=True):
            engine.address = address  # the same engine may have another role by now
            engine.draining, engine.moving = engine.name in draining, engine.name in moving
            lost = frozenset((unlinked or {}).get(engine.name, ()))
            for source in lost - engine.unlinked:
                engine.cut_waiting(source)
            engine.unlinked = lost
            self.publish(engine)
            if self._tasks is not None and engine not in self._watches:
                self._watches[engine] = self._tasks.create_task(self._watch(engine))
        self._only = _only_pair(wanted)
        self._inline = _inline(wanted)
        self._known_fields.clear()
        self.changed.set()

    def _drop(self, engine: Engine) -> None:
        if (watch := self._watches.pop(engine, None)) is not None:
            watch.cancel()
        engine.healthy = False
        engine.cut(f"{engine.name} is no longer part of the service")
        engine.client.close()

    def views(self, pieces: Sequence[int] = ()) -> list[View]:
        """The current data for routing."""
        now = time.monotonic()
        found = []
        for engine in self.engines:
            prompts, streams = self._loads(engine)
            work = engine.condition.work
            # An engine that is not ours may predict anything.
            if work is not None and (seconds := work.times.prompt_s(work.budget, 0, work.budget)) > 0:
                prompts = Load(prompts.pending, work.budget / self._tokens_per_byte / seconds)
            address = engine.address
            found.append(
                View(
                    address.name,
                    address.role,
                    address.exchange,
                    engine.usable(now),
                    prompts,
                    streams,
                    engine.prefill_s.recent(),
                    engine.token_s.recent(),
                    engine.prefixes.matched(pieces) if pieces else 0.0,
                    engine.lost_peers(now),
                    address.role in engine.dialect.pairing.alone,
                    address.role != "hybrid" or engine.dialect.pairing.hybrids_pair,
                )
            )
        return found

    def known_fields(self, path: str) -> frozenset[str] | None:
        """The fields known by all engines that report them; None if none does."""
        if path not in self._known_fields:
            kinds = {engine.address.exchange: engine.dialect for engine in self.engines}
            known = [found for one in kinds.values() if (found := one.known_fields(path)) is not None]
            self._known_fields[path] = frozenset.intersection(*known) if known else None
        return self._known_fields[path]

    def only_pair(self) -> EnginePair | None:
        """The only possible pair, if there is exactly one."""
        if len(self.engines) > 2:
            return None
        now = time.monotonic()
        if not all(engine.usable(now) and not engine.lost_peers(now) for engine in self.engines):
            return None
        return self._only

    @property
    def has_inline(self) -> bool:
        """Whether a decode engine may compute whole requests."""
        return bool(self._inline)

    def inline(
        self, pair: EnginePair, size: float, pieces: Sequence[int], avoid: Collection[str], tpot_s: float
    ) -> tuple[str, Why] | None:
        """The decode engine that should compute this request instead of the pair, and why; None if none should."""
        prefill, decode = (self._prospect(self.by_name[name], pieces) for name in (pair.prefill, pair.decode))
        if prefill is None or decode is None:
            return None
        now, tokens = time.monotonic(), size * self._tokens_per_byte
        found: tuple[float, str, Why] | None = None
        for engine in self._inline:
            if engine.name in avoid or not engine.usable(now):
                continue
            other = decode if engine.name == pair.decode else self._prospect(engine, pieces)
            better = is_better(prefill, decode, other, tokens, tpot_s) if other is not None else None
            if better is not None and (found is None or better[0] > found[0]):
                found = (better[0], engine.name, better[1])
        return found and found[1:]

    def _prospect(self, engine: Engine, pieces: Sequence[int]) -> Prospect | None:
        work = engine.condition.work
        if work is None:
            return None
        prompts, streams = self._loads(engine)
        cached = engine.prefixes.matched(pieces) * self._tokens_per_byte if pieces else 0.0
        before = prompts.pending * self._tokens_per_byte
        return Prospect(work, before, streams.pending, cached, engine.hand_over_s)

    def _loads(self, engine: Engine) -> tuple[Load, Load]:
        """The prompts and streams that the engine has from all workers."""
        if self._shared is not None:
            return self._shared.loads(engine.index)
        prompts, streams = engine.prompts, engine.streams
        return Load(prompts.pending, prompts.speed), Load(streams.pending, streams.speed)

    def answered(self, size: float, prompt_tokens: int) -> None:
        """A request of `size` bytes had so many tokens."""
        if size > 0 and prompt_tokens > 0:
            self._tokens_per_byte += _NEWEST * (prompt_tokens / size - self._tokens_per_byte)

    def outlook(self, size: float, max_tokens: int | None) -> Outlook:
        """The outlook for a request of `size` bytes."""
        now = time.monotonic()
        if now - self._room[0] > _ROOM_S:
            self._room = (now, *self._seats_and_room(now))
        (_, seats, room), ttft_s = self._room, 0.0
        wanted = size * self._tokens_per_byte + (max_tokens or 0)
        if self._predicts:
            prefills = [engine for engine in self.engines if engine.address.role != "decode" and engine.healthy]
            ttft_s = min([self._ttft(engine, size) for engine in prefills], default=0.0)
        return Outlook(seats, ttft_s, room is None or room >= wanted)

    def _seats_and_room(self, now: float) -> tuple[int | None, int | None]:
        """Total seats of all decoding engines, and free KV tokens of the emptiest one; None if unknown."""
        usable = [engine for engine in self.engines if engine.usable(now)]
        decodes = [engine for engine in usable if engine.address.role != "prefill"] or usable
        seats = [engine.condition.seats for engine in decodes]
        known = sum(seat or 0 for seat in seats) if seats and all(seats) else None
        if known is not None and self._shared is not None:
            # The other workers' requests also take seats.
            theirs = sum(self._shared.loads(e.index)[1].pending - e.streams.pending for e in decodes)
            known = max(1, known - int(theirs))
        rooms = [engine.condition.kv_tokens_free for engine in decodes]
        return known, None if None in rooms else max((room or 0 for room in rooms), default=None)

    def _ttft(self, engine: Engine, size: float) -> float:
        if (prospect := self._prospect(engine, ())) is not None:
            return prompts_s(prospect, size * self._tokens_per_byte, prospect.work.budget)
        prompts = self._loads(engine)[0]
        return (prompts.pending + size) / prompts.speed if prompts.speed else 0.0

    def predicted_s(self, engine: Engine) -> float:
        """Seconds for the prompts that the engine has, if none is in its cache; 0 if its kind does not predict."""
        work = engine.condition.work
        tokens = max(1.0, self._loads(engine)[0].pending * self._tokens_per_byte)
        return work.times.prompt_s(tokens, 0, work.budget) if work is not None else 0.0

    def publish(self, engine: Engine) -> None:
        """Publish an engine's load. A removed engine may still end calls, but its slot may belong to another by now."""
        if self._shared is not None and self.by_name.get(engine.name) is engine:
            self._shared.publish(engine.index, engine.prompts, engine.streams)

    def suspect(self, engine: Engine) -> None:
        """A call could not reach the engine: probe it now. Running calls continue until the result is known."""
        engine.asked.set()

    async def is_proven(self, engine: Engine, since: float) -> bool:
        """Whether the engine answers a probe sent at `since` (monotonic) or later.

        A process that was killed before does not, although its sockets may still accept data.
        """
        deadline = time.monotonic() + _PROOF_PROBES * _PROBE_TIMEOUT_S
        while engine.healthy and engine.answered_at < since and time.monotonic() < deadline:
            engine.asked.set()
            await asyncio.sleep(_PROOF_LOOK_S)
        return engine.healthy and engine.answered_at >= since

    def lost(self, engine: Engine, reason: str) -> None:
        """The engine is down: no requests are sent until it answers again, and running calls are cut."""
        if engine.healthy:
            _log.info("%s is down: %s", engine.name, reason)
        engine.healthy = False
        engine.cut(f"{engine.name} is down: {reason}")
        for other in self.engines:
            if other.dialect.pairing.waits_forever:
                other.cut_waiting(engine.name)

    async def watch_forever(self) -> None:
        """Probe every engine and check for stuck calls, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self._watch_calls())
            for engine in self.engines:
                self._watches[engine] = tasks.create_task(self._watch(engine))

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when an engine has become available, or after `timeout_s`."""
        self.changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self.changed.wait()
        except TimeoutError:
            return

    def close(self) -> None:
        """Close every idle connection."""
        for engine in self.engines:
            engine.client.close()

    async def _watch_calls(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            for engine in self.engines:
                for ticket in tuple(engine.tickets):
                    since = ticket.exchange.waiting_since
                    if since and now - since > ticket.patience_s:
                        ticket.exchange.cut(f"{engine.name} sent nothing for {now - since:.1f} s")
                silent = engine.stuck_s(now)
                if silent is not None:
                    _log.warning("%s produced no token on any stream for %.1f s", engine.name, silent)
                    engine.stalls += 1
                    engine.breaker.failed(now, sure=True)
                    engine.cut(f"{engine.name} produced no token for {silent:.1f} s")

    async def _watch(self, engine: Engine) -> None:
        while True:
            started = time.monotonic()
            engine.asked.clear()
            try:
                path = engine.dialect.probe_path
                answer = await engine.client.request("GET", path, engine.headers, timeout_s=_PROBE_TIMEOUT_S)
                engine.answered_at = started
                condition = engine.dialect.parse_condition(answer.status, answer.body)
                if condition.usable and not engine.healthy:
                    condition = await self._measured(engine, condition)
                self._observed(engine, condition)
            except Unreachable as failure:
                self._missed(engine, failure)
            pause = _HEALTHY_S if engine.healthy else _DOWN_S
            left = pause - (time.monotonic() - started)
            try:
                # Failed calls trigger an early probe, but not more often than for an engine that is down.
                async with asyncio.timeout(max(0.0, left)):
                    await engine.asked.wait()
                await asyncio.sleep(0.02)
            except TimeoutError:
                continue

    async def _measured(self, engine: Engine, condition: Condition) -> Condition:
        """An engine that is back is usable only once its room is known, if it has one. Raises Unreachable."""
        probe = engine.dialect.pairing.room
        if probe is None or engine.address.role != "prefill":
            return condition
        answer = await engine.client.request("GET", probe.path, engine.headers, timeout_s=_PROBE_TIMEOUT_S)
        tokens = probe.tokens(answer.body) if answer.status == 200 else None
        if not tokens:
            _log.warning("%s does not say how much KV it has: status %d at %s", engine.name, answer.status, probe.path)
            return replace(condition, usable=False)
        # Each worker has its part, so that together they never have more.
        engine.room = engine.room or KvRoom()
        engine.room.renewed(tokens // (self._shared.workers if self._shared is not None else 1))
        return condition

    def _observed(self, engine: Engine, condition: Condition) -> None:
        engine.misses = 0
        engine.condition = condition
        if condition.usable and not engine.healthy:
            _log.info("%s is available", engine.name)
            engine.renewed()
            engine.healthy = True
            self.changed.set()
        elif engine.healthy and not condition.usable:
            self.lost(engine, "its probe failed")

    def _missed(self, engine: Engine, failure: Unreachable) -> None:
        engine.misses += 1
        # A refused connection is conclusive; silence only if it lasts.
        if not failure.sent or engine.misses >= _MISSES:
            self.lost(engine, str(failure))


def _inline(engines: list[Engine]) -> list[Engine]:
    """The decode engines that also take whole requests."""
    return [engine for engine in engines if engine.address.inline and engine.address.role == "decode"]


def _only_pair(engines: list[Engine]) -> EnginePair | None:
    """One prefill and one decode engine of the same kind, or a single engine."""
    if len(engines) == 1 and engines[0].address.role in engines[0].dialect.pairing.alone:
        return EnginePair(engines[0].name, engines[0].name)
    by_role = {engine.address.role: engine for engine in engines}
    if len(engines) == 2 and set(by_role) == {"prefill", "decode"} and len({e.address.exchange for e in engines}) == 1:
        return EnginePair(by_role["prefill"].name, by_role["decode"].name)
    return None
