"""What one node runs of a cluster's topology. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from pdctl.net import LOOPBACK
from pdctl.topology.spec import EngineGroup, Topology


@dataclass(frozen=True, slots=True)
class Share:
    """`engines`: names of the engines that run on `node`; engines that are only attached belong to every node.
    `is_empty`: nothing runs there, no proxy either."""

    node: str
    engines: frozenset[str] = frozenset()
    is_empty: bool = False

    def of(self, topology: Topology, address: str) -> Topology:
        """The part of a topology that this node runs. `address`: where its proxy listens, if the topology says no other
        address than the loopback one."""
        parts = [(group, self._part(group)) for group in topology.engines]
        here = tuple(part for _, part in parts if part is not None)
        elsewhere = tuple(group for group, part in parts if part is None)
        proxy = topology.proxy
        if proxy.host == LOOPBACK:
            proxy = replace(proxy, host=address)
        return replace(topology, engines=here, elsewhere=elsewhere, proxy=proxy)

    def has_proxy(self, topology: Topology) -> bool:
        """Whether this node runs a proxy."""
        return not self.is_empty and (not topology.proxy.nodes or self.node in topology.proxy.nodes)

    def _part(self, group: EngineGroup) -> EngineGroup | None:
        if group.is_attached:
            return group
        numbers = _numbers(group, self.engines)
        return replace(group, replicas=len(numbers), numbers=numbers) if numbers else None


def _numbers(group: EngineGroup, names: Collection[str]) -> tuple[int, ...]:
    return tuple(number for number, name in enumerate(group.replica_names()) if name in names)
