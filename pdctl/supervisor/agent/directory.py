"""The nodes of a cluster as one of them knows them: those that are registered, and those that were."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Never

import msgspec

from pdctl.registry import Change, Registry
from pdctl.registry.mirror import Mirror, follow
from pdctl.supervisor.cluster.entries import Keys, NodeEntry
from pdctl.supervisor.surface.cluster.agents import AgentAddress


@dataclass(slots=True)
class _Known:
    """`gone_at`: when the registry ceased to know it; None while it does."""

    entry: NodeEntry
    gone_at: float | None = None


class Directory:
    """`node`: our own name, which is left out. A node that the registry does not know any more is still listed for
    `keep_s` seconds: it may answer, and whoever looks should see that it is missing."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        node: str,
        keep_s: float,
        heard: Callable[[str | None], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._prefix = keys.nodes
        self._node = node
        self._keep_s = keep_s
        self._heard = heard
        self._clock = clock
        self._mirror = Mirror()
        self._known: dict[str, _Known] = {}

    async def run_forever(self) -> Never:
        """Follow the registry until cancelled. Raises Refused."""
        await follow(self._registry, self._prefix, self._take, self._heard, self._mirror)

    def others(self) -> list[AgentAddress]:
        """The agents of other nodes, by name."""
        now = self._clock()
        self._known = {
            name: known
            for name, known in self._known.items()
            if known.gone_at is None or now - known.gone_at < self._keep_s
        }
        return [_address(known) for _, known in sorted(self._known.items())]

    def _take(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            name = change.key.removeprefix(self._prefix)
            if change.entry is None:
                if name in self._known and self._known[name].gone_at is None:
                    self._known[name].gone_at = self._clock()
            elif name != self._node and (entry := _node_of(change.entry.value)) is not None:
                self._known[name] = _Known(entry)


def _node_of(value: bytes) -> NodeEntry | None:
    """What a node tells of itself; None for something that this version does not understand."""
    try:
        return msgspec.json.decode(value, type=NodeEntry)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _address(known: _Known) -> AgentAddress:
    entry = known.entry
    return AgentAddress(entry.name, entry.address, entry.agent_port, known.gone_at is None, entry.pdctl)
