"""Blocks as values of a store: bytes with a header that says which block they are, and a digest of both.

The digest has a key, the secret of the service: who can write to the store, but does not know it, cannot make an engine
use other KV. A value that was cut, mixed up or changed on its way is found the same way.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

import numpy as np

from pdctl.engine.tiers import Rows

_VERSION = 1
# Version, bytes of the block.
_HEAD = struct.Struct("<4sHxxQ")
_MAGIC = b"pdkv"
_DIGEST_BYTES = 16
HEADER_BYTES = _HEAD.size + _DIGEST_BYTES


class Sealed:
    """Seals and opens blocks of `block_bytes`."""

    def __init__(self, secret: str, block_bytes: int) -> None:
        self._key = hashlib.blake2b(secret.encode(), digest_size=32).digest()
        self._head = _HEAD.pack(_MAGIC, _VERSION, block_bytes)
        self._block_bytes = block_bytes

    def seal(self, name: bytes, row: Rows) -> bytes:
        """The value of a block."""
        content = row.tobytes()
        return b"".join((self._head, self._digest(name, content), content))

    def opened(self, name: bytes, value: bytes) -> Rows | None:
        """The block of a value; None if it is not the one with this name, whole and unchanged."""
        if len(value) != HEADER_BYTES + self._block_bytes or not value.startswith(self._head):
            return None
        content = memoryview(value)[HEADER_BYTES:]
        if not hmac.compare_digest(self._digest(name, content), value[_HEAD.size : HEADER_BYTES]):
            return None
        return np.frombuffer(content, dtype=np.uint8)

    def _digest(self, name: bytes, content: bytes | memoryview) -> bytes:
        found = hashlib.blake2b(self._head + name, digest_size=_DIGEST_BYTES, key=self._key)
        found.update(content)
        return found.digest()
