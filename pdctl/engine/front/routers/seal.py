"""Seals: how a decode engine recognizes a hand-over that a router without the run's secret brings."""

from __future__ import annotations

import hashlib
import hmac

import msgspec

from pdctl.wire import HandOver

# The run's secret is also a bearer token; what is signed with it must not be usable as anything else.
_PURPOSE = b"pdctl hand-over\0"


class Seal:
    """Signs hand-overs with the run's secret. A changed one is not genuine: its addresses would make an engine send the
    secret elsewhere, or read other memory."""

    def __init__(self, secret: str) -> None:
        self._key = secret.encode()

    def sealed(self, given: HandOver) -> HandOver:
        """The same hand-over with its seal."""
        return msgspec.structs.replace(given, seal=self._sign(given))

    def is_genuine(self, given: HandOver) -> bool:
        """Whether an engine of this run sealed exactly this. Routers may reorder its fields."""
        return bool(self._key) and hmac.compare_digest(self._sign(given).encode(), given.seal.encode())

    def _sign(self, given: HandOver) -> str:
        said = msgspec.json.encode(msgspec.structs.replace(given, seal=""))
        return hmac.new(self._key, _PURPOSE + said, hashlib.sha256).hexdigest()
