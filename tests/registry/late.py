"""A registry of which one member is frozen now and then: writes to it are not answered, and happen when it goes on."""

from __future__ import annotations

from collections.abc import Sequence

from pdctl.registry import Created, Delete, Modified, Put, Unavailable
from pdctl.registry.memory import MemoryRegistry


class LateRegistry(MemoryRegistry):
    """While `is_frozen`, each write is kept, and Unavailable is raised; `thaw` makes the kept ones."""

    def __init__(self) -> None:
        super().__init__()
        self.is_frozen = False
        self.kept: list[tuple[Sequence[Put | Delete], Sequence[Created | Modified]]] = []

    async def write(self, writes: Sequence[Put | Delete], conditions: Sequence[Created | Modified] = ()) -> int | None:
        if self.is_frozen:
            self.kept.append((writes, conditions))
            raise Unavailable("the member is frozen")
        return await super().write(writes, conditions)

    async def thaw(self) -> None:
        """The member goes on."""
        self.is_frozen = False
        kept, self.kept = self.kept, []
        for writes, conditions in kept:
            await self.write(writes, conditions)
