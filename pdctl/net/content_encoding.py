"""Compressed request bodies (RFC 9110, 8.4), with limits on the decompressed size and the number of encodings."""

from __future__ import annotations

import zlib

import anyio.to_thread

from pdctl.net.openai.api import ApiError

# Clients compress once. Each further encoding, and each further member of a gzip body, costs as much as the first.
_MAX_ENCODINGS, _MAX_MEMBERS = 2, 16
# Bodies with fewer compressed bytes are decompressed in the event loop: this takes a few milliseconds at most.
_SMALL = 4096

# Accept the zlib or the gzip header: the RFC, and some clients, call zlib's format deflate.
_EITHER = 32 + zlib.MAX_WBITS
_KNOWN = frozenset({"gzip", "x-gzip", "deflate"})


async def unpacked(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Like `decoded`, but a large body is decompressed in a thread, so that it does not block other requests."""
    if len(body) < _SMALL:
        return decoded(body, encoding, limit)
    return await anyio.to_thread.run_sync(decoded, body, encoding, limit)


def decoded(body: bytes, encoding: bytes, limit: int) -> bytes:
    """The body before `encoding` (the header's value) was applied.

    Raises ApiError 415 for an unknown encoding or more than two, 400 for a body that does not match its encoding, 413
    for one that decompresses to more than `limit` bytes.
    """
    names = [name for word in encoding.decode("latin-1").split(",") if (name := word.strip().lower()) != "identity"]
    if len(names) > _MAX_ENCODINGS:
        raise ApiError(415, f"{len(names)} content-encodings; at most {_MAX_ENCODINGS} are supported")
    for name in reversed(names):
        if name not in _KNOWN:
            raise ApiError(415, f"content-encoding {name[:64]!r} is not supported; gzip and deflate are")
        body = _unpacked(body, name, limit)
    return body


def _unpacked(body: bytes, name: str, limit: int) -> bytes:
    parts: list[bytes] = []
    left = limit
    while body or not parts:
        if len(parts) == _MAX_MEMBERS:
            raise ApiError(400, f"the body has more than {_MAX_MEMBERS} gzip members")
        unpacking = zlib.decompressobj(_EITHER)
        try:
            parts.append(unpacking.decompress(body, left + 1))
        except zlib.error as failure:
            raise ApiError(400, f"the body is not valid {name} (its content-encoding): {failure}") from None
        left -= len(parts[-1])
        if left < 0:
            raise ApiError(413, f"the body is larger than {limit} bytes when decompressed")
        if not unpacking.eof:
            raise ApiError(400, f"the body ends within its {name} data")
        # A gzip body may have several members, one after another.
        body = unpacking.unused_data
    return b"".join(parts)
