"""Who may see the page, and who may change something with it. Pure.

A page of another origin could have the browser of a user call this server: by address, or by a name of its own that
points to 127.0.0.1 (DNS rebinding). So a request must name this machine as its host, come from no other origin, and
have the token, which only the page has that was opened with it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

_BEARER = b"Bearer "
# What a browser says of a request's origin, besides that it is another one:
# https://developer.mozilla.org/docs/Web/HTTP/Headers/Sec-Fetch-Site
_OUR_SITE = (b"same-origin", b"none")


class Needs(Enum):
    """What a request needs: nothing of the service is in the page's own files."""

    FILE = "a file of the page"
    READ = "a view of the service"
    WRITE = "a change of the service"


class Refusal(NamedTuple):
    """An answer without what was asked for."""

    status: int
    reason: str


class Gate:
    """Checks requests. `secret`: the run's, from which the tokens are derived, so that a link outlives a takeover."""

    def __init__(self, secret: str, listens_on: str) -> None:
        self._read = _token(secret, "dashboard, to read")
        self._write = _token(secret, "dashboard, to write")
        # The port may be another one at the user's end of a tunnel; a name that others control is what must not be.
        self._hosts = {"127.0.0.1", "localhost", "::1", listens_on}

    def token(self, write: bool) -> str:
        """The token of a link."""
        return self._write if write else self._read

    def may_write(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the request has the token for changes."""
        return hmac.compare_digest(headers.get(b"authorization", b""), _BEARER + self._write.encode())

    def refusal(self, needs: Needs, headers: Mapping[bytes, bytes]) -> Refusal | None:
        """Why a request is refused, or None. Header names are in lower case."""
        host = headers.get(b"host", b"")
        if host_of(host.decode("latin-1")) not in self._hosts:
            return Refusal(403, "This page answers only to localhost, 127.0.0.1 or [::1], not to other host names.")
        if needs is Needs.FILE:
            return None
        origin = headers.get(b"origin")
        if origin is not None and origin != b"http://" + host:
            return Refusal(403, "Requests of pages from another origin are refused.")
        if headers.get(b"sec-fetch-site", b"none") not in _OUR_SITE:
            return Refusal(403, "Requests of pages from another site are refused.")
        return self._without_token(needs, headers)

    def _without_token(self, needs: Needs, headers: Mapping[bytes, bytes]) -> Refusal | None:
        given = headers.get(b"authorization", b"")
        # Both are always compared: how long an answer takes must not depend on the token.
        writes = self.may_write(headers)
        reads = hmac.compare_digest(given, _BEARER + self._read.encode())
        if not (reads or writes):
            return Refusal(401, "This needs the token of a link. Get a link with: pdctl dash")
        if needs is Needs.WRITE and not writes:
            return Refusal(403, "This link only shows the service. Get one that may change it with: pdctl dash --write")
        return None


def host_of(host: str) -> str:
    """The name or address in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _token(secret: str, purpose: str) -> str:
    return hmac.new(secret.encode(), purpose.encode(), hashlib.sha256).hexdigest()[:40]
