"""The streams of this engine that its service's proxy can have moved to another engine while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.handover.offers import Offering
from pdctl.net.openai.fields import OfferTo
from pdctl.wire import MoveCall, MoveReply


class _Stream(NamedTuple):
    """`core_id`: its request's name in the core."""

    core_id: str
    offering: Offering


class Moves:
    """The streams, by the proxy's names for its calls."""

    def __init__(self, core: CoreClient) -> None:
        self._core = core
        self._streams: dict[str, _Stream] = {}

    @contextmanager
    def open(self, attempt: str, core_id: str, offering: Offering) -> Iterator[None]:
        """A stream can be moved until it ends. Without an `attempt` nobody can name it."""
        if not attempt:
            yield
            return
        self._streams[attempt] = _Stream(core_id, offering)
        try:
            yield
        finally:
            del self._streams[attempt]

    def move(self, call: MoveCall) -> MoveReply:
        """Move a stream. The core decides whether it still can; asking again changes nothing."""
        stream = self._streams.get(call.attempt)
        if stream is not None:
            stream.offering.redirect(OfferTo(call.host, call.port))
            self._core.move(stream.core_id)
        return MoveReply(stream is not None)
