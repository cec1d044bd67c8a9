"""Sessions: the numbers by which LMDeploy's proxy names KV that a prefill engine keeps."""

from __future__ import annotations

import secrets
from collections import OrderedDict

from pdctl.wire import HandOver

# Whoever knows a number may use or free its KV, so it cannot be guessed. Every JSON library reads up to 2^53 exactly.
_BITS = 52
_MOST = 4096


class SessionBook:
    """The hand-overs of kept KV, by session. Each is given out once. The KV itself is kept by its lease."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[HandOver, float]] = OrderedDict()

    def keep(self, hand_over: HandOver, now: float) -> int:
        """Keep a hand-over until its lease ends without a reader; returns its session."""
        while self._kept and (len(self._kept) >= _MOST or next(iter(self._kept.values()))[1] <= now):
            self._kept.popitem(last=False)
        session = new_session()
        self._kept[session] = (hand_over, now + hand_over.lease_s)
        return session

    def take(self, session: int) -> HandOver | None:
        """The session's hand-over; None if it is unknown or was taken before."""
        found = self._kept.pop(session, None)
        return found[0] if found else None


def new_session() -> int:
    """A number that names no other session. Not 0, which LMDeploy's proxy takes for a missing one."""
    return 1 + secrets.randbits(_BITS)
