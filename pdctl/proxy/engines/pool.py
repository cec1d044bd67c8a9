"""All engines of a proxy: probes, and the end of stuck calls."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pdctl.adapters import Condition, RequestState
from pdctl.net.http_client import Unreachable
from pdctl.net.identity import ContextFactory
from pdctl.net.pauses import Sleeper
from pdctl.net.prefixes.beginnings import Beginning
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.fleet import Fleet
from pdctl.proxy.engines.kv_room import KvRoom
from pdctl.proxy.engines.load import SharedLoads
from pdctl.proxy.engines.prefixes.asking import ask
from pdctl.proxy.engines.prefixes.following import follow_forever
from pdctl.proxy.engines.prefixes.learning import Learner
from pdctl.proxy.engines.prefixes.places import Places
from pdctl.proxy.engines.prefixes.subscribing import subscribe
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


class EnginePool(Fleet):
    """All engines, the probes that tell which of them answer, and the event that one has become available."""

    def __init__(
        self,
        engines: list[Engine],
        shared: SharedLoads | None = None,
        predicts: bool = False,
        places: Places | None = None,
    ) -> None:
        super().__init__(engines, time.monotonic, shared, predicts)
        self._places = places or Places()
        self._learner = Learner(self._places, lambda: self.engines)
        self.changed = asyncio.Event()
        # Whether engines are asked of which prompts they have KV.
        self.wants_prefixes = False
        self._secret = ""
        self._tls: ContextFactory | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._watches: dict[Engine, asyncio.Task[None]] = {}
        self._known_fields: dict[str, frozenset[str] | None] = {}

    @classmethod
    def of(
        cls,
        addresses: Sequence[EngineAddress],
        secret: str = "",
        shared: SharedLoads | None = None,
        predicts: bool = False,
        tls: ContextFactory | None = None,
    ) -> EnginePool:
        """A pool without known healthy engines yet; `predicts`: outlooks include a predicted TTFT; `tls`: for engines
        that want certificates.

        Raises PdctlError for an unreadable secret.
        """
        places = Places()
        found = cls([Engine.of(address, secret, tls, places) for address in addresses], shared, predicts, places)
        found._secret, found._tls = secret, tls
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
        wanted = [
            known.get(address.identity) or Engine.of(address, self._secret, self._tls, self._places)
            for address in addresses
        ]
        for engine in set(self.engines) - set(wanted):
            self._drop(engine)
        self.use(wanted, predicts)
        drains, moves = frozenset(draining), frozenset(moving)
        for engine, address in zip(wanted, addresses, strict=True):
            engine.follow(address)
            engine.draining, engine.moving = engine.name in drains, engine.name in moves
            lost = frozenset((unlinked or {}).get(engine.name, ()))
            for source in lost - engine.unlinked:
                engine.cut_waiting(source)
            engine.unlinked = lost
            self.publish(engine)
            if self._tasks is not None and engine not in self._watches:
                self._watches[engine] = self._tasks.create_task(self._watch(engine))
        self.roles_changed()
        self._known_fields.clear()
        self.changed.set()

    def _drop(self, engine: Engine) -> None:
        if (watch := self._watches.pop(engine, None)) is not None:
            watch.cancel()
        engine.healthy = False
        engine.cut(f"{engine.name} is no longer part of the service")
        engine.client.close()

    def known_fields(self, path: str) -> frozenset[str] | None:
        """The fields known by all engines that report them; None if none does."""
        if path not in self._known_fields:
            kinds = {engine.address.exchange: engine.dialect for engine in self.engines}
            known = [found for one in kinds.values() if (found := one.known_fields(path)) is not None]
            self._known_fields[path] = frozenset.intersection(*known) if known else None
        return self._known_fields[path]

    def learn(self, engine: Engine, beginning: Beginning | None, state: RequestState) -> None:
        """An engine has computed this prompt: learn what its pieces are in tokens, later, if that is of use."""
        if beginning is not None:
            self._learner.put(engine, beginning, state)

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
            tasks.create_task(self._learner.run_forever())
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
        sleeper, awake_since = Sleeper(), 0.0
        while True:
            stood_still = await sleeper.overslept(_WATCH_S)
            now = time.monotonic()
            awake_since = now if stood_still else awake_since
            for engine in self.engines:
                for ticket in tuple(engine.tickets):
                    since = max(awake_since, ticket.exchange.waiting_since)
                    if ticket.exchange.waiting_since and now - since > ticket.patience_s:
                        ticket.exchange.cut(f"{engine.name} sent nothing for {now - since:.1f} s")
                silent = engine.stuck_s(now, awake_since)
                if silent is not None:
                    _log.warning("%s produced no token on any stream for %.1f s", engine.name, silent)
                    engine.stalls += 1
                    engine.breaker.failed(now, sure=True)
                    engine.cut(f"{engine.name} produced no token for {silent:.1f} s")

    async def _watch(self, engine: Engine) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._probe_forever(engine))
            if engine.dialect.tells_pieces:
                tasks.create_task(follow_forever(engine, ask, lambda: self.wants_prefixes))
            elif engine.dialect.tokenizer is not None:
                # It may begin to publish events, when the plan changes.
                tasks.create_task(follow_forever(engine, subscribe, lambda: self._wants_events(engine)))

    def _wants_events(self, engine: Engine) -> bool:
        return self.wants_prefixes and engine.address.kv_events is not None

    async def _probe_forever(self, engine: Engine) -> None:
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
