"""Names of blocks by their content: a chain of digests over the tokens up to the end of each block.

Two blocks with one name hold the same KV: the name covers the model, its number type, the size of blocks, the tenant
and every token from the first on. SHA-256, because tenants choose the tokens, and a collision would give one tenant's
KV to another.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import msgspec

from pdctl.names.policies import SEGMENT_TOKENS
from pdctl.wire import Manifest


def segment(block_size: int) -> int:
    """The tokens of a segment, where prompts are computed in segments: the bits of a block's KV then depend on its
    tokens alone, and not on where a hit began or a budget ended."""
    return -(-SEGMENT_TOKENS // block_size) * block_size


def root(manifest: Manifest, secret: str = "") -> bytes:
    """The beginning of every chain of one model on one kind of pool. Names can leave the process: without `secret`
    nobody can tell whether a name is that of certain tokens."""
    shapes = [(shape.kv_heads, shape.key_dim, shape.value_dim) for shape in manifest.layers]
    parts = ("pdctl-kv1", secret, manifest.model, manifest.dtype, manifest.block_size, shapes)
    return hashlib.sha256(repr(parts).encode()).digest()


def salt_of(tenant: str, chosen: str | None) -> str:
    """The salt of a tenant's requests: who has sent the same prompt before could be told by the time of an answer. A
    client may divide further."""
    return msgspec.json.encode([tenant, chosen or ""]).decode() if tenant or chosen else ""


def tenant_of(salt: str) -> str:
    """Whose requests have this salt. One that comes from elsewhere may be any text: then its requests are a tenant."""
    try:
        return msgspec.json.decode(salt, type=tuple[str, str])[0] if salt else ""
    except msgspec.DecodeError:
        return salt


def salted(beginning: bytes, salt: str) -> bytes:
    """The beginning for requests with this salt. They share no blocks with others."""
    return hashlib.sha256(beginning + salt.encode()).digest() if salt else beginning


def following(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a block that holds `tokens`, after the block `before`."""
    return hashlib.sha256(before + array("I", tokens).tobytes()).digest()
