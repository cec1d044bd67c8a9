"""TLS contexts of an identity. They are made again when its files change: a renewed certificate needs no restart.

TLS 1.3 only. A server wants a certificate of its own CA from every client; a client wants one that has the server's
address. Before a pair of contexts is used, they shake hands with each other in memory: that checks the key, the CA, the
dates and the purposes in one go, and tells what the certificate says.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pdctl.errors import PdctlError
from pdctl.net.identity import FILES, Who, who_is

# How often the files are looked at, seconds: at most at each new connection.
LOOK_S = 5.0
_OTHERS_MAY_READ = 0o007
_ABOUT_CERTIFICATES = ("CERTIFICATE_VERIFY_FAILED", "PEER_DID_NOT_RETURN_A_CERTIFICATE")
_HINT = "make certificates with: pdctl cluster init, and pdctl cluster certify or join"

_log = logging.getLogger(__name__)

Certificate = Mapping[str, object]
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    """What one state of the files gives. `begins`, `ends`: of the certificate, seconds since 1970."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    who: Who
    begins: float
    ends: float


class Identity:
    """The identity in `folder`. Raises PdctlError if it cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamp = _stamp(folder)
        self._pair = self._made()
        self._looked = time.monotonic()
        self._said = ""
        self._lasting: ssl.SSLContext | None = None

    @property
    def who(self) -> Who:
        """The service and the node that it speaks for."""
        return self._pair.who

    @property
    def begins(self) -> float:
        """When its certificate began, in seconds since 1970."""
        return self._pair.begins

    @property
    def ends(self) -> float:
        """When its certificate ends, in seconds since 1970."""
        return self._pair.ends

    def server_context(self) -> ssl.SSLContext:
        """For a server. It follows renewed certificates by itself, so it is asked for once."""
        return self._current().server

    def client_context(self) -> ssl.SSLContext:
        """For the next connection of a client: ask for each."""
        return self._current().client

    def lasting_context(self) -> ssl.SSLContext:
        """For a client that keeps its context: always the same one, brought up to date whenever it is asked for."""
        if self._lasting is None:
            self._lasting = _context(self.folder, ssl.PROTOCOL_TLS_CLIENT)
        self._current()
        return self._lasting

    def _current(self) -> _Pair:
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._look()
        return self._pair

    def _look(self) -> None:
        """Follow changed files. Files that do not fit each other are being written, or wrong: the old ones stay."""
        try:
            stamp = _stamp(self.folder)
            if stamp == self._stamp:
                return
            made = self._made()
            if made.who != self.who:
                raise PdctlError(f"the new certificate in {self.folder} is of another node, {made.who.node}")
            if self._lasting is not None:
                _fill(self._lasting, self.folder)
        except PdctlError as failure:
            if str(failure) != self._said:
                self._said = str(failure)
                _log.warning("the certificate in use is not replaced: %s", failure)
            return
        self._pair, self._stamp, self._said = made, stamp, ""
        _log.info("the certificates in %s are new, and used from now on", self.folder)

    def _made(self) -> _Pair:
        server = _context(self.folder, ssl.PROTOCOL_TLS_SERVER)
        client = _context(self.folder, ssl.PROTOCOL_TLS_CLIENT)
        server.verify_mode = ssl.CERT_REQUIRED
        # Without tickets every connection is checked anew, also one that begins after a certificate has ended.
        server.num_tickets = 0
        shown = _shown_to_itself(self.folder, server, client)
        server.sni_callback, server.sslobject_class = self._at_hello, TellsWhy
        who = who_in(shown)
        if who is None:
            message = f"the certificate in {self.folder} does not name one node as spiffe://SERVICE/node/NAME"
            raise PdctlError(message, _HINT)
        begins, ends = (ssl.cert_time_to_seconds(str(shown[name])) for name in ("notBefore", "notAfter"))
        return _Pair(server, client, who, begins, ends)

    def _at_hello(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """A client connects; called whether or not it names a server."""
        now = self._current().server
        if now is not context:
            connection.context = now


class TellsWhy(ssl.SSLObject):
    """The server's end of a connection. asyncio and uvloop close one whose handshake fails without sending the alert
    that tells the client why; so the failure is raised only at the next call, when the alert has been sent. A client
    that stays is closed when the time for the handshake is over."""

    _failure: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        """As of SSLObject."""
        if self._failure is not None:
            raise self._failure
        try:
            super().do_handshake()
        except ssl.SSLError as failure:
            if failure.reason not in _ABOUT_CERTIFICATES:
                raise
            self._failure = failure
            raise ssl.SSLWantReadError from None


def who_in(certificate: Certificate) -> Who | None:
    """Whom a peer's certificate, as Python decodes it, speaks for."""
    names = cast("tuple[tuple[str, str], ...]", certificate.get("subjectAltName", ()))
    return who_is([value for kind, value in names if kind == "URI"])


def _context(folder: Path, protocol: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.hostname_checks_common_name = False
    _fill(context, folder)
    return context


def _fill(context: ssl.SSLContext, folder: Path) -> None:
    """Give the context what the files have. Raises PdctlError."""
    ca, cert, key = (folder / name for name in FILES)
    try:
        if key.stat().st_mode & _OTHERS_MAY_READ:
            raise PdctlError(f"every user of this machine may read {key}", f"chmod 600 {key}")
        context.load_verify_locations(ca)
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as failure:
        raise PdctlError(f"the certificates in {folder} cannot be used: {_words(failure)}", _HINT) from None


def _shown_to_itself(folder: Path, server: ssl.SSLContext, client: ssl.SSLContext) -> Certificate:
    """The certificate that a client of this identity shows to a server of it, after both have checked each other."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    # Which address a certificate has is for the peers to check: the files do not say which one they will use.
    client.check_hostname = False
    asking = client.wrap_bio(down, up)
    client.check_hostname = True
    answering = server.wrap_bio(up, down, server_side=True)
    try:
        for end in (asking, answering, asking, answering):
            _step(end)
    except ssl.SSLError as failure:
        message = f"the certificate in {folder} cannot be used: {_words(failure)}"
        raise PdctlError(message, "renew it with: pdctl cluster renew, or make a new one") from None
    shown = answering.getpeercert()
    assert shown, "a server that requires a certificate has one"
    return shown


def _step(end: ssl.SSLObject) -> None:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return


def _stamp(folder: Path) -> _Stamp:
    """Differs when a file has been replaced. Raises PdctlError if one is missing."""
    try:
        found = [(folder / name).stat() for name in FILES]
    except OSError as failure:
        message = f"the certificates in {folder} cannot be read: {failure.strerror}: {failure.filename}"
        raise PdctlError(message, _HINT) from None
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in found)


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _words(failure: Exception) -> str:
    if verified := getattr(failure, "verify_message", ""):
        return str(verified)
    if "KEY_VALUES_MISMATCH" in str(failure):
        return "node.key is not the key of node.pem"
    return str(failure).partition(" (_ssl")[0]
