"""API keys: a file with a name and a hash per line. The keys themselves are not stored."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from pdctl.errors import PdctlError
from pdctl.net.openai.api import ApiError
from pdctl.user_files import read_api_keys

_log = logging.getLogger(__name__)

ANYONE = "-"
# Where clients of Anthropic's API send a key.
API_KEY_HEADER = b"x-api-key"


class Keys:
    """The valid API keys. Without a file every client is accepted, with the name `-`."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._stamp: tuple[int, int] | None = None
        self._names: dict[bytes, str] = {}
        if self._path is not None:
            self._names = read_api_keys(self._path)
            self._stamp = _stamp(self._path)

    def name_of(self, authorization: bytes, api_key: bytes = b"") -> str:
        """The key's name, from these two headers; one valid key is enough. Raises ApiError 401."""
        if self._path is None:
            return ANYONE
        scheme, _, key = authorization.partition(b" ")
        sent = [key.strip() for key in (key if scheme.lower() == b"bearer" else b"", api_key) if key]
        if not sent:
            raise ApiError(401, "send an API key: Authorization: Bearer KEY, or X-Api-Key: KEY", "authentication_error")
        given = [hashlib.sha256(key).digest() for key in sent]
        # Compare all keys, each in constant time, so that the time reveals nothing about them.
        found = [name for one in given for known, name in self._names.items() if hmac.compare_digest(known, one)]
        if not found:
            raise ApiError(401, "unknown API key", "authentication_error")
        return found[0]

    @property
    def names(self) -> frozenset[str]:
        """The names of all valid keys."""
        return frozenset(self._names.values())

    def reload(self) -> None:
        """Read the file again if it has changed. If it cannot be read, the keys stay as they are."""
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._names = read_api_keys(self._path)
            _log.info("%d API keys loaded", len(self._names))
        except PdctlError as failure:
            _log.warning("%s; the previous keys stay valid", failure)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
