"""Choose the ports of processes. Pure: the input is what is taken."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pdctl.errors import PdctlError

# Each service starts its search at a different offset, so that two services that start at the same time do not choose
# the same port.
_ENGINE_PORTS = range(18100, 26100)
_PORTS_PER_SERVICE = 16


@dataclass(frozen=True, slots=True)
class PortSearch:
    """Where the ports of one service are searched. `allowed`: first and last port, empty for the default range."""

    run_dir: Path
    allowed: tuple[int, ...]

    def ports(self) -> list[int]:
        """All ports of the range, in the order of the search."""
        ports = range(self.allowed[0], self.allowed[1] + 1) if self.allowed else _ENGINE_PORTS
        places = 1 if self.allowed else len(ports) // _PORTS_PER_SERVICE
        first = zlib.crc32(str(self.run_dir).encode()) % places * _PORTS_PER_SERVICE
        return [*ports[first:], *ports[:first]]

    def run(self, length: int, taken: set[int]) -> list[int]:
        """`length` consecutive free ports. Raises PdctlError if there are none."""
        wanted = self.ports()
        for first in wanted:
            found = [first + n for n in range(length)]
            if taken.isdisjoint(found) and found[-1] <= max(wanted):
                return found
        hint = "widen service.engine_ports" if self.allowed else None
        count = f"no {length} consecutive free ports" if length > 1 else "no free port"
        raise PdctlError(f"{count} from {min(wanted)} to {max(wanted)} for an engine", hint)


def free_ports(
    purposes: tuple[str, ...], before: Mapping[str, int], taken: set[int], search: PortSearch
) -> dict[str, int]:
    """A port for each purpose, added to `taken`. A process keeps the ports that it had `before`.

    Purposes that differ only in a final number get consecutive ports. Raises PdctlError if no port is free.
    """
    ports: dict[str, int] = {}
    for _, run in groupby(purposes, lambda purpose: re.sub(r"-\d+$", "", purpose)):
        names = list(run)
        found = [before.get(name, 0) for name in names]
        if not all(found):
            found = search.run(len(names), taken)
        ports |= dict(zip(names, found, strict=True))
        taken.update(found)
    return ports
