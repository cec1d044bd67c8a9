"""Beginnings of prompts by name, so that a proxy can ask who has their KV without knowing their tokens.

A prompt is cut into pieces of 256 bytes of its request. The name of a piece is a digest of everything up to its end, of
who asked, and of the salt: it says nothing to who does not know these, and equal beginnings of different keys have
different names. The proxy sends the names with a request, and the engine says of which of them it has the KV.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

# Bytes of a piece, and the pieces of one prompt that have names.
PIECE_BYTES = 256
MOST_PIECES = 64
_NAME_BYTES = 8


class Beginning(NamedTuple):
    """The first pieces of a prompt of so many bytes."""

    size: int
    pieces: tuple[int, ...]

    def blocks(self, tokens: int, block_size: int) -> list[int]:
        """How many whole blocks are before the end of each piece, if the prompt has so many tokens.

        A piece that ends at a part of the bytes is taken to end at the same part of the tokens. That is a guess, and
        only used to choose an engine: what is found is decided by the names of blocks."""
        per_piece = PIECE_BYTES / self.size * tokens
        return [int((number + 1) * per_piece) // block_size for number in range(len(self.pieces))]


def beginning_of(prompt: bytes, salt: bytes = b"") -> Beginning:
    """The names of a prompt's first pieces. `salt`: who shares them."""
    digest = blake2b(b"%d:%b" % (len(salt), salt), digest_size=_NAME_BYTES)
    names = []
    for end in range(PIECE_BYTES, min(len(prompt), PIECE_BYTES * MOST_PIECES) + 1, PIECE_BYTES):
        digest.update(prompt[end - PIECE_BYTES : end])
        names.append(int.from_bytes(digest.digest(), "big"))
    return Beginning(len(prompt), tuple(names))


def to_header(beginning: Beginning) -> bytes:
    """As the value of a header."""
    names = b"".join(piece.to_bytes(_NAME_BYTES, "big") for piece in beginning.pieces)
    return b"%d:%b" % (beginning.size, names.hex().encode())


def from_header(value: str) -> Beginning | None:
    """From the value of a header; None if it is no such value."""
    size, _, names = value.partition(":")
    try:
        found = bytes.fromhex(names)
    except ValueError:
        return None
    count = len(found) // _NAME_BYTES
    if not size.isdecimal() or len(size) > 12 or len(found) % _NAME_BYTES or not 0 < count <= MOST_PIECES:
        return None
    if count * PIECE_BYTES > int(size):
        return None
    cut = (found[at : at + _NAME_BYTES] for at in range(0, len(found), _NAME_BYTES))
    return Beginning(int(size), tuple(int.from_bytes(name, "big") for name in cut))
