"""Tokens with which a machine joins a cluster once: who may use them is who was given them.

A token says its id, a secret, and the fingerprint of the CA, so that the joining machine knows whom to believe. The
folder of the CA keeps a hash of the secret, the node, and when the token ends; a used token is renamed, which only one
can do.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from pdctl.errors import PdctlError
from pdctl.net.identity.files import write_file

_FORM = re.compile(r"(?P<id>[0-9a-f]{8})\.(?P<secret>[A-Za-z0-9_-]{43})\.(?P<ca>[0-9a-f]{64})")
_ID = re.compile(r"[0-9a-f]{8}")
_NO_TOKEN = "this token is not known here, was used before, or has ended"  # noqa: S105 - a message
_HINT = "make another one, beside the CA: pdctl cluster token DIR NODE"


class Token(NamedTuple):
    """What the joining machine has. `ca`: SHA-256 of the CA's certificate."""

    id: str
    secret: str
    ca: str

    @property
    def text(self) -> str:
        """As it is written into a file."""
        return ".".join(self)


class Kept(msgspec.Struct, frozen=True):
    """What is kept of a token. `addresses`: of the node; none: the one that it joins from. `ends`: in seconds since
    1970."""

    hash: str
    node: str
    addresses: tuple[str, ...]
    ends: float


def read_token(file: Path) -> Token:
    """The token in a file. Raises PdctlError."""
    try:
        text = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as failure:
        raise PdctlError(f"the token in {file} cannot be read: {failure}") from None
    if (found := _FORM.fullmatch(text)) is None:
        raise PdctlError(f"{file} has no token of pdctl cluster token", _HINT)
    return Token(found["id"], found["secret"], found["ca"])


class Tokens:
    """The tokens of the CA in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tokens"

    def make(self, ca: str, node: str, addresses: tuple[str, ...], ends: float) -> Token:
        """A new token. Raises PdctlError if it cannot be kept."""
        made = Token(secrets.token_hex(4), secrets.token_urlsafe(32), ca)
        kept = Kept(_hash(made.secret), node, addresses, ends)
        write_file(self._file(made.id), msgspec.json.encode(kept))
        return made

    def check(self, token_id: str, secret: str, now: float) -> Kept:
        """What a token allows, without using it. Raises PdctlError; the reason does not tell which part is wrong."""
        try:
            # An id is a part of a file's name.
            kept = msgspec.json.decode(self._file(token_id).read_bytes() if _ID.fullmatch(token_id) else b"", type=Kept)
        except (OSError, msgspec.DecodeError):
            raise PdctlError(_NO_TOKEN, _HINT) from None
        if not hmac.compare_digest(kept.hash, _hash(secret)) or now >= kept.ends:
            raise PdctlError(_NO_TOKEN, _HINT)
        return kept

    @contextmanager
    def used(self, token_id: str) -> Iterator[None]:
        """Use a token that was checked. It can be used again if what is done meanwhile fails. Raises PdctlError if
        somebody else has just used it."""
        file = self._file(token_id)
        used = file.with_suffix(".used")
        try:
            file.rename(used)
        except OSError:
            raise PdctlError(_NO_TOKEN, _HINT) from None
        try:
            yield
        except PdctlError:
            with contextlib.suppress(OSError):
                used.rename(file)
            raise

    def _file(self, token_id: str) -> Path:
        return self._folder / f"{token_id}.json"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
