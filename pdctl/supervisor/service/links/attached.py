"""The engines that pdctl did not start, as far as their links must be kept: which answer, and since which start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdctl.adapters import Ability, control
from pdctl.net.http_client import ConnectionPool, Unreachable, header_lines
from pdctl.plan import Attached
from pdctl.supervisor.service.kv import Member
from pdctl.user_files import read_user_text

_ASK_S = 2.0


@dataclass(slots=True)
class _Seen:
    """One engine. `lives`: how many times it has come back, for engines that do not tell their start."""

    attached: Attached
    pool: ConnectionPool
    secret: str = ""
    answers: bool = False
    lives: int = 0
    start: str = ""

    @property
    def epoch(self) -> str:
        """Differs after every restart."""
        return self.start or f"life-{self.lives}"


class AttachedEngines:
    """`attached` returns those of the service; only those with Ability.LINK and a `start_path` are asked."""

    def __init__(self, attached: Callable[[], Sequence[Attached]], say: Callable[[str, str], None]) -> None:
        self._attached = attached
        self._say = say
        self._seen: dict[Attached, _Seen] = {}

    def members(self) -> list[Member]:
        """Those that answered the last call."""
        return [
            Member(one.name, one.kind, one.role, one.host, one.port, seen.epoch, seen.secret)
            for one, seen in self._seen.items()
            if seen.answers
        ]

    async def look(self) -> None:
        """Ask all of them, at once."""
        wanted = [one for one in self._attached() if is_watched(one.kind)]
        for gone in self._seen.keys() - set(wanted):
            self._seen.pop(gone).pool.close()
        for one in wanted:
            if one not in self._seen:
                self._seen[one] = _Seen(one, ConnectionPool(one.host, one.port, connect_s=_ASK_S))
        await asyncio.gather(*(self._ask(seen) for seen in self._seen.values()))

    def close(self) -> None:
        """Close every connection."""
        for seen in self._seen.values():
            seen.pool.close()

    async def _ask(self, seen: _Seen) -> None:
        faces = control(seen.attached.kind)
        if not seen.answers and not self._read_secret(seen):
            return
        headers = header_lines({"authorization": f"Bearer {seen.secret}"}) if seen.secret else b""
        try:
            answer = await seen.pool.request("GET", faces.start_path, headers, timeout_s=_ASK_S)
        except Unreachable:
            seen.answers = False
            return
        if not seen.answers:
            seen.lives += 1
        seen.answers = True
        seen.start = faces.start_of(answer.body) if answer.status == 200 else ""

    def _read_secret(self, seen: _Seen) -> bool:
        path = seen.attached.secret_file
        if not path:
            return True
        try:
            secret = read_user_text(Path(path)).strip()
        except OSError as failure:
            self._say(seen.attached.name, f"{path} cannot be read: {failure.strerror}")
            return False
        seen.secret = secret
        return True


def is_watched(kind: str) -> bool:
    """Whether engines of this kind are asked."""
    faces = control(kind)
    return Ability.LINK in faces.abilities and bool(faces.start_path)
