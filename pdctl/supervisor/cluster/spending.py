"""What the proxies of all nodes took from the limits of API keys, as this node's agent knows it. Pure: news and times
in, messages out. `exchange.py` carries them.

Nothing is added up here: each start of a proxy counts for itself, and only the proxy that hears of it computes what is
new (proxy/shares/elsewhere.py). So an agent may be started again at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from pdctl.proxy_wire import KeySpent, SourceSpent, SpentNews, SpentReply

# What was not heard of for this long is forgotten, seconds.
_FORGOTTEN_S = 3600.0


class NodeSpent(msgspec.Struct, frozen=True):
    """What an agent tells other agents: what the proxies of its node have taken, by the name of each start."""

    sources: dict[str, SourceSpent]


@dataclass(frozen=True, slots=True)
class _Known:
    """What one start of a proxy has taken, as it was at `at`."""

    at: float
    epoch: str
    keys: Mapping[str, KeySpent]


class Spending:
    """What each start of a proxy has last told."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._own: dict[str, _Known] = {}
        # The last start before the present one, of each proxy: others may not have heard its last words.
        self._ended: dict[str, _Known] = {}
        self._others: dict[str, tuple[float, NodeSpent]] = {}

    def replied(self, proxy: str, reply: SpentReply, now: float) -> None:
        """A proxy of this node has answered."""
        before = self._own.get(proxy)
        if before is not None and before.epoch != reply.epoch:
            ended = {key: msgspec.structs.replace(mine, streams=0.0) for key, mine in before.keys.items()}
            self._ended[proxy] = _Known(before.at, before.epoch, ended)
        self._own[proxy] = _Known(now, reply.epoch, reply.keys)

    def heard(self, node: str, spent: NodeSpent, now: float) -> None:
        """Another node's agent has answered."""
        self._others[node] = now, spent

    def keep_only(self, nodes: Iterable[str], now: float) -> None:
        """Forget other nodes than these, and what is long gone."""
        kept = set(nodes)
        self._others = {node: known for node, known in self._others.items() if node in kept}
        for starts in (self._own, self._ended):
            for proxy in [proxy for proxy, known in starts.items() if now - known.at > _FORGOTTEN_S]:
                del starts[proxy]

    def report(self, now: float) -> NodeSpent:
        """For other agents."""
        starts = [*self._ended.items(), *self._own.items()]
        return NodeSpent(
            {
                f"{self._node}/{proxy}@{known.epoch}": SourceSpent(now - known.at, dict(known.keys))
                for proxy, known in starts
            }
        )

    def news(self, now: float) -> SpentNews:
        """For this node's proxies."""
        elsewhere = {
            source: msgspec.structs.replace(spent, age_s=spent.age_s + now - at)
            for at, told in self._others.values()
            for source, spent in told.sources.items()
        }
        return SpentNews(elsewhere, self.report(now).sources)
