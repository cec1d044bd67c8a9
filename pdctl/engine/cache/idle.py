"""What is kept although nobody uses it, in the order in which it is given up. It handles only keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, KeysView
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Idle(Generic[Key]):
    """Keys with the tenant of each. The one that was used longest ago is given up first, but before it those of tenants
    that have more than `quota` of them: so nobody's many prompts drive out everybody else's few. 0: no quota."""

    def __init__(self, quota: int = 0) -> None:
        self._quota = quota
        self._tenant_of: OrderedDict[Key, str] = OrderedDict()
        # Without a quota, nobody is counted.
        self._of: dict[str, OrderedDict[Key, None]] = {}
        self._over: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tenant_of)

    def __contains__(self, key: Key) -> bool:
        return key in self._tenant_of

    def keys(self) -> KeysView[Key]:
        """All keys, the one that was used longest ago first."""
        return self._tenant_of.keys()

    def put(self, key: Key, tenant: str) -> None:
        """Keep a key as the one that was used last."""
        assert key not in self._tenant_of
        self._tenant_of[key] = tenant
        if self._quota:
            mine = self._of.setdefault(tenant, OrderedDict())
            mine[key] = None
            if len(mine) > self._quota:
                self._over[tenant] = None

    def use(self, key: Key) -> None:
        """A key that is kept was used."""
        self._tenant_of.move_to_end(key)
        if self._quota:
            self._of[self._tenant_of[key]].move_to_end(key)

    def remove(self, key: Key) -> None:
        """A key is not idle any more."""
        self._leave(key, self._tenant_of.pop(key))

    def pop(self) -> Key:
        """Give up the first one."""
        order = self._of[next(iter(self._over))] if self._over else self._tenant_of
        key = next(iter(order))
        self.remove(key)
        return key

    def audit(self) -> None:
        """Check the order of each tenant against that of all."""
        if not self._quota:
            assert not self._of
            return
        orders: dict[str, list[Key]] = {}
        for key, tenant in self._tenant_of.items():
            orders.setdefault(tenant, []).append(key)
        assert {tenant: list(mine) for tenant, mine in self._of.items()} == orders, "a tenant has other keys"
        over = {tenant for tenant, mine in orders.items() if len(mine) > self._quota}
        assert self._over.keys() == over, "other tenants have too much"

    def _leave(self, key: Key, tenant: str) -> None:
        if not self._quota:
            return
        mine = self._of[tenant]
        del mine[key]
        if len(mine) <= self._quota:
            self._over.pop(tenant, None)
        if not mine:
            del self._of[tenant]
