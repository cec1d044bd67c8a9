"""Certificates of clusters for tests, made as `pdctl cluster` makes them."""

from __future__ import annotations

import ssl
from pathlib import Path

from pdctl.commands.cluster.authority import Authority, new_key
from pdctl.net.identity.files import write_identity

SERVICE = "test"
# A certificate that began an hour ago and ended half an hour ago.
EXPIRED = -0.5 / 24


def made_ca(folder: Path, service: str = SERVICE) -> Authority:
    folder.mkdir(parents=True, exist_ok=True)
    return Authority.create(folder, service)


def made_node(ca: Authority, folder: Path, node: str, *addresses: str, days: float = 1.0) -> Path:
    """The folder of a node's identity."""
    key = new_key()
    write_identity(folder, ca.pem, ca.certify(key.request, node, addresses, days), key.pem)
    return folder


def stranger_context(folder: Path) -> ssl.SSLContext:
    """A client that shows whatever is in the folder, and believes every server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if (folder / "node.pem").exists():
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
    return context
