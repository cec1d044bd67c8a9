"""Who a process of a cluster is: a folder with its node's certificate and key, and with the CA that it believes.

Only clusters with certificates import more than this file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pdctl.errors import PdctlError

if TYPE_CHECKING:
    import ssl

    from pdctl.net.identity.contexts import Identity

__all__ = [
    "CERTIFICATES_ENV", "FILES", "PEER", "ContextFactory", "Who", "identity_for", "identity_in", "own_identity",
    "uri_of", "who_is",
]  # fmt: skip

# The folder of the process's identity.
CERTIFICATES_ENV = "PDCTL_CERTIFICATES"
# The CA's certificate, or several; the node's, and its key.
FILES = ("ca.pem", "node.pem", "node.key")
# Where an ASGI scope says whom the peer's certificate speaks for: a Who, or None if it names no node. Servers that want
# no certificates say nothing.
PEER = "pdctl.peer"
# Gives the context for a new connection: certificates are renewed while processes run.
ContextFactory = Callable[[], "ssl.SSLContext"]

_URI = re.compile(r"spiffe://(?P<service>[A-Za-z0-9._-]{1,63})/node/(?P<node>[A-Za-z0-9._-]{1,253})")


class Who(NamedTuple):
    """Whom a certificate speaks for."""

    service: str
    node: str


def uri_of(service: str, node: str) -> str:
    """The name of a node in its certificate."""
    return f"spiffe://{service}/node/{node}"


def who_is(uris: list[str]) -> Who | None:
    """Whom a certificate with these URIs speaks for; None unless it names exactly one node."""
    found = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    return Who(found["service"], found["node"]) if found is not None else None


def own_identity() -> Identity | None:
    """This process's identity, if it was given one. Raises PdctlError if it cannot be used."""
    folder = os.environ.get(CERTIFICATES_ENV, "")
    return identity_in(folder) if folder else None


def identity_in(folder: str) -> Identity:
    """The identity in a folder. Raises PdctlError if it cannot be used."""
    from pdctl.net.identity.contexts import Identity

    return Identity(Path(folder))


def identity_for(folder: str, service: str, node: str) -> Identity:
    """The identity of this node. Raises PdctlError if the folder has another one's."""
    found = identity_in(folder)
    if found.who != Who(service, node):
        of = f"node {found.who.node} of service {found.who.service}"
        message = f"the certificate in {folder} is of {of}, not of node {node} of service {service}"
        raise PdctlError(message, "name this node with --node, or make a certificate for it: pdctl cluster certify")
    return found
