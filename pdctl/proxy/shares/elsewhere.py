"""What the proxies of other nodes took from the limits of API keys. Pure: the caller passes the times.

Each start of a proxy worker is a source: it counts up from zero, and its numbers come again and again, late or not at
all. What is charged is the difference to what came before, so nothing is charged twice or forgotten.

Two cases have no such difference. This worker is new: it begins at the highest level that any source has. A source is
new here, or was silent for long, as after a cut network: much of what it took is refilled, so no more is charged than
the level that it has itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from pdctl.proxy.shares.limits import NOTHING, Levels, Totals
from pdctl.proxy_wire import KeySpent, SourceSpent, SpentNews

# A source that was not heard for longer than this was silent, seconds. Answers at once of one that was not heard for
# the second time do not count: it has probably gone, and they with it.
_SILENT_S, _GONE_S = 5.0, 10.0
# A source that was not heard for this long is forgotten; at most so many sources and keys are kept.
_FORGOTTEN_S = 3600.0
_MAX_SOURCES, _MAX_KEYS = 4096, 4096


@dataclass(slots=True)
class _Source:
    heard_at: float
    before: dict[str, Totals] = field(default_factory=dict)


@dataclass(slots=True)
class Found:
    """What is new: `levels` to begin at, `taken` since the last time, and all answers at once."""

    levels: list[tuple[str, Levels]] = field(default_factory=list)
    taken: dict[str, Totals] = field(default_factory=dict)
    streams: dict[str, float] = field(default_factory=dict)


class Elsewhere:
    """Turns what sources have taken since their starts into what is to be charged now."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}
        self._is_new = True

    def take(self, news: SpentNews, now: float) -> Found:
        """Count the news."""
        found = Found()
        if self._is_new:
            self._is_new = False
            for spent in (*news.elsewhere.values(), *news.here.values()):
                found.levels += [(key, _levels(mine, spent.age_s)) for key, mine in spent.keys.items()]
            for name, spent in news.elsewhere.items():
                self._sources[name] = _Source(now - spent.age_s, _totals(spent))
        else:
            self._charge(news.elsewhere, now, found)
        for spent in news.elsewhere.values():
            for key, mine in spent.keys.items() if spent.age_s < _GONE_S else ():
                found.streams[key] = found.streams.get(key, 0.0) + mine.streams
        self._forget(now)
        return found

    def _charge(self, elsewhere: dict[str, SourceSpent], now: float, found: Found) -> None:
        late: dict[str, list[tuple[Totals, KeySpent]]] = defaultdict(list)
        for name, spent in elsewhere.items():
            source = self._sources.get(name)
            heard_at = now - spent.age_s
            is_late = source is None or heard_at - source.heard_at > _SILENT_S
            if source is None:
                source = self._sources[name] = _Source(heard_at)
            source.heard_at = max(source.heard_at, heard_at)
            for key, mine in spent.keys.items():
                taken = _news(source, key, mine)
                if is_late:
                    late[key].append((taken, mine))
                elif taken != NOTHING:
                    found.taken[key] = _sum(found.taken.get(key, NOTHING), taken)
        for key, parts in late.items():
            found.taken[key] = _sum(found.taken.get(key, NOTHING), _limited(parts))

    def _forget(self, now: float) -> None:
        """The sources that were heard last stay."""
        by_age = sorted(self._sources.items(), key=lambda item: -item[1].heard_at)[:_MAX_SOURCES]
        self._sources = {name: source for name, source in by_age if now - source.heard_at < _FORGOTTEN_S}


def _news(source: _Source, key: str, mine: KeySpent) -> Totals:
    """What a source took of a key since the last time; nothing if these numbers are older than those."""
    before = source.before.get(key, NOTHING)
    if mine.requests < before.requests or (key not in source.before and len(source.before) >= _MAX_KEYS):
        return NOTHING
    source.before[key] = Totals(mine.requests, mine.tokens)
    return Totals(mine.requests - before.requests, mine.tokens - before.tokens)


def _limited(parts: list[tuple[Totals, KeySpent]]) -> Totals:
    """The sum of what late sources took, but no more than the highest level among them."""
    requests, tokens = (math.fsum(taken[number] for taken, _ in parts) for number in (0, 1))
    return Totals(
        min(requests, max(mine.requests_level for _, mine in parts)),
        min(tokens, max(mine.tokens_level for _, mine in parts)),
    )


def _sum(one: Totals, other: Totals) -> Totals:
    return Totals(one.requests + other.requests, one.tokens + other.tokens)


def _totals(spent: SourceSpent) -> dict[str, Totals]:
    return {key: Totals(mine.requests, mine.tokens) for key, mine in spent.keys.items()}


def _levels(mine: KeySpent, age_s: float) -> Levels:
    return Levels(mine.requests_level, mine.tokens_level, age_s)
