"""All engines of a proxy as routing and admission see them. Pure: the clock is given, and others set which engines
answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.inline import Prospect, Why, is_better, prompts_s
from pdctl.proxy.engines.load import SharedLoads
from pdctl.proxy.engines.outlook import Outlook, Room, room_of
from pdctl.proxy.engines.routing import EnginePair, Load, View

# Seats and KV room are cached this long: they change only with probes, which are less frequent. Seconds.
_ROOM_S = 0.02
# Request bytes per prompt token, until answers have shown it, and the weight of the newest answer.
_BYTES_PER_TOKEN = 3.0
_NEWEST = 0.05


class Fleet:
    """All engines. `clock`: monotonic seconds; `shared`: the loads of all workers of the proxy; `predicts`: outlooks
    include a predicted TTFT."""

    def __init__(
        self,
        engines: list[Engine],
        clock: Callable[[], float],
        shared: SharedLoads | None = None,
        predicts: bool = False,
    ) -> None:
        self._clock = clock
        self._shared = shared
        # Tokens per byte of a request, as answered requests had.
        self._tokens_per_byte = 1 / _BYTES_PER_TOKEN
        self._room_at, self._room = -math.inf, Room()
        self.use(engines, predicts)
        self.roles_changed()

    def use(self, engines: list[Engine], predicts: bool) -> None:
        """Use these engines from now on."""
        self.engines, self._predicts = engines, predicts
        self.by_name = {engine.name: engine for engine in engines}

    def roles_changed(self) -> None:
        """The engines or their roles have changed."""
        self._only = _only_pair(self.engines)
        self._inline = _inline(self.engines)

    def views(self, pieces: Sequence[int] = ()) -> list[View]:
        """The current data for routing."""
        now = self._clock()
        found = []
        for engine in self.engines:
            engine.forget_what_is_old(now)
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
                    engine.prefixes.matched(pieces, now) if pieces else 0.0,
                    engine.lost_peers(now),
                    address.role in engine.dialect.pairing.alone,
                    address.role != "hybrid" or engine.dialect.pairing.hybrids_pair,
                )
            )
        return found

    def only_pair(self) -> EnginePair | None:
        """The only possible pair, if there is exactly one."""
        if len(self.engines) > 2:
            return None
        now = self._clock()
        if not all(engine.usable(now) and not engine.lost_peers(now) for engine in self.engines):
            return None
        return self._only

    @property
    def has_inline(self) -> bool:
        """Whether a decode engine may compute whole requests beside pairs."""
        return bool(self._inline)

    def inline(
        self, pair: EnginePair, size: float, pieces: Sequence[int], avoid: Collection[str], tpot_s: float
    ) -> tuple[str, Why] | None:
        """The decode engine that should compute this request instead of the pair, and why; None if none should."""
        prefill, decode = (self._prospect(self.by_name[name], pieces) for name in (pair.prefill, pair.decode))
        if prefill is None or decode is None:
            return None
        now, tokens = self._clock(), size * self._tokens_per_byte
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
        cached = engine.prefixes.matched(pieces, self._clock()) * self._tokens_per_byte if pieces else 0.0
        before = prompts.pending * self._tokens_per_byte
        return Prospect(work, before, streams.pending, cached, engine.hand_over_s)

    def _loads(self, engine: Engine) -> tuple[Load, Load]:
        """The prompts and streams that the engine has from all workers."""
        if self._shared is not None:
            return self._shared.loads(engine.index, self._clock())
        prompts, streams = engine.prompts, engine.streams
        return Load(prompts.pending, prompts.speed), Load(streams.pending, streams.speed)

    def answered(self, size: float, prompt_tokens: int) -> None:
        """A request of `size` bytes had so many tokens."""
        if size > 0 and prompt_tokens > 0:
            self._tokens_per_byte += _NEWEST * (prompt_tokens / size - self._tokens_per_byte)

    def tokens_of(self, size: float) -> float:
        """The predicted tokens of a request of `size` bytes."""
        return size * self._tokens_per_byte

    def outlook(self, size: float, max_tokens: int | None) -> Outlook:
        """The outlook for a request of `size` bytes."""
        now = self._clock()
        if now - self._room_at > _ROOM_S:
            self._room_at, self._room = now, room_of(self.engines, now, self._others_streams)
        room, tokens, ttft_s = self._room, self.tokens_of(size), 0.0
        if self._predicts:
            prefills = [engine for engine in self.engines if engine.address.role != "decode" and engine.healthy]
            ttft_s = min([self._ttft(engine, size) for engine in prefills], default=0.0)
        kv_room = room.kv_tokens is None or room.kv_tokens >= tokens + (max_tokens or 0)
        return Outlook(room.seats, ttft_s, kv_room, tokens, room.prompts, room.prefills)

    def _others_streams(self, engine: Engine) -> float:
        """Streams of other workers at an engine."""
        return (
            self._shared.loads(engine.index, self._clock())[1].pending - engine.streams.pending if self._shared else 0.0
        )

    def _ttft(self, engine: Engine, size: float) -> float:
        if (prospect := self._prospect(engine, ())) is not None:
            return prompts_s(prospect, size * self._tokens_per_byte, prospect.work.budget)
        prompts, _ = self._loads(engine)
        return (prompts.pending + size) / prompts.speed if prompts.speed else 0.0

    def expected_s(self, engine: Engine) -> float | None:
        """How long the prompts that the engine has should take; None if it is unknown."""
        meter = engine.prompts
        speed = meter.speed or meter.usual
        # Prompts that were in the cache make an engine seem faster than it is.
        return max(meter.pending / speed, self.predicted_s(engine)) if speed else None

    def predicted_s(self, engine: Engine) -> float:
        """Seconds for the prompts that the engine has, if none is in its cache; 0 if its kind does not predict."""
        work = engine.condition.work
        tokens = max(1.0, self._loads(engine)[0].pending * self._tokens_per_byte)
        return work.times.prompt_s(tokens, 0, work.budget) if work is not None else 0.0

    def publish(self, engine: Engine) -> None:
        """Publish an engine's load. A removed engine may still end calls, but its slot may belong to another by now."""
        if self._shared is not None and self.by_name.get(engine.name) is engine:
            self._shared.publish(engine.index, engine.prompts, engine.streams)


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
