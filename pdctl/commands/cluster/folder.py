"""The folders of certificates: the CA's, beside which the service's secret is, and the nodes'."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

import msgspec

from pdctl.commands.cluster.authority import Authority, new_key, now, validity_of
from pdctl.errors import PdctlError
from pdctl.net.identity import identity_in
from pdctl.net.identity.files import write_file, write_identity

SECRET, JOINED = "secret", "joined.json"
_NODE = re.compile(r"[A-Za-z0-9._-]{1,253}")


class Issued(msgspec.Struct, frozen=True):
    """A node that may renew its certificate, kept beside the CA: without it, its certificate ends."""

    node: str
    addresses: tuple[str, ...]


class Joined(msgspec.Struct, frozen=True):
    """Where a node joined, and renews its certificate."""

    at: str


class CaFolder:
    """The folder of a CA. Raises PdctlError if there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.read(folder)

    @classmethod
    def create(cls, folder: Path, service: str) -> CaFolder:
        """Make a CA and the secret of the service. Raises PdctlError."""
        Authority.create(folder, service)
        write_file(folder / SECRET, secrets.token_urlsafe(32).encode())
        return cls(folder)

    @property
    def secret(self) -> bytes:
        """The secret of the service. Raises PdctlError."""
        try:
            return (self.folder / SECRET).read_bytes()
        except OSError as failure:
            raise PdctlError(f"the secret of the service cannot be read: {failure}") from None

    def remember(self, node: str, addresses: tuple[str, ...]) -> None:
        """A node was certified: it may renew that later. Raises PdctlError."""
        write_file(self._issued(node), msgspec.json.encode(Issued(node, addresses)))

    def renew(self, request: bytes, node: str, days: float) -> bytes:
        """A new certificate for a node that has one. Raises PdctlError."""
        try:
            known = msgspec.json.decode(self._issued(node).read_bytes(), type=Issued)
        except (OSError, msgspec.DecodeError):
            message = f"node {node} has no certificate of this CA that may be renewed"
            raise PdctlError(message, "join again, or use: pdctl cluster certify") from None
        return self.authority.certify(request, known.node, known.addresses, days)

    def _issued(self, node: str) -> Path:
        return self.folder / "issued" / f"{checked_node(node)}.json"


def checked_node(node: str) -> str:
    """The name of a node. Raises PdctlError for one that a certificate cannot have."""
    if not _NODE.fullmatch(node) or node.startswith("."):
        raise PdctlError(f"{node!r} is not a node's name", "use letters, digits, dots, dashes and underscores")
    return node


def certify_here(ca: CaFolder, node: str, addresses: tuple[str, ...], to: Path, days: float) -> None:
    """Write a node's folder, for those who copy files by hand. Raises PdctlError."""
    key = new_key()
    certificate = ca.authority.certify(key.request, checked_node(node), addresses, days)
    ca.remember(node, addresses)
    write_identity(to, ca.authority.pem, certificate, key.pem)
    write_file(to / SECRET, ca.secret)


def renew_here(ca: CaFolder, folder: Path, days: float) -> None:
    """Renew the certificate in a node's folder with a CA on this machine. Raises PdctlError."""
    node, key = identity_in(str(folder)).who.node, new_key()
    write_identity(folder, ca.authority.pem, ca.renew(key.request, node, days), key.pem)


def joined_at(folder: Path) -> str:
    """Where the node joined. Raises PdctlError."""
    try:
        return msgspec.json.decode((folder / JOINED).read_bytes(), type=Joined).at
    except (OSError, msgspec.DecodeError):
        message = f"{folder} does not say where this node joined"
        raise PdctlError(message, "beside the CA: pdctl cluster renew --ca DIR, or pdctl cluster certify") from None


def is_due(folder: Path) -> tuple[bool, str]:
    """Whether half of the certificate's life is over, and when it ends. Raises PdctlError."""
    try:
        validity = validity_of((folder / "node.pem").read_bytes())
    except OSError as failure:
        raise PdctlError(f"the certificate in {folder} cannot be read: {failure.strerror}") from None
    return validity.is_due(now()), f"{validity.ends:%Y-%m-%d %H:%M} UTC"
