"""Requests that engines died of, and are not to be sent to another."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict

from pdctl.openai_api import ApiError

# Engines that died with a request in them, without a token between, until it is taken for the cause.
_DEATHS = 2
# How long the same body is refused, seconds, and how many are remembered.
_REMEMBERED_S = 600.0
_MAX_REMEMBERED = 1024


class Quarantine:
    """Two deaths at the same token are no accident: the others that were there got further somewhere else."""

    def __init__(self) -> None:
        self.count = 0
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def judge(self, body: bytes, deaths: int) -> None:
        """Raises ApiError when a request was present at too many deaths; the same body is refused from then on."""
        if deaths < _DEATHS:
            return
        self.count += 1
        self._until[_digest(body)] = time.monotonic() + _REMEMBERED_S
        while len(self._until) > _MAX_REMEMBERED:
            self._until.popitem(last=False)
        raise _refusal()

    def check(self, body: bytes) -> None:
        """Raises ApiError for a body that is in quarantine."""
        if self._until and self._until.get(_digest(body), 0.0) > time.monotonic():
            raise _refusal()


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()


def _refusal() -> ApiError:
    message = (
        f"{_DEATHS} engines died with this request in them, at the same token: it is in quarantine, and the same "
        f"request is refused for {_REMEMBERED_S / 60:.0f} minutes"
    )
    # Not a 5xx: clients repeat those by themselves.
    return ApiError(422, message, "request_quarantined")
