"""Compressed request bodies (RFC 9110, 8.4), bounded by what they unpack to."""

from __future__ import annotations

import zlib

from pdctl.openai_api import ApiError

# zlib's own header or gzip's, whichever comes: some clients call zlib's format deflate, as the RFC does.
_EITHER = 32 + zlib.MAX_WBITS
_KNOWN = frozenset({"gzip", "x-gzip", "deflate"})


def decoded(body: bytes, encoding: bytes, limit: int) -> bytes:
    """The body as it was before `encoding`, the header's value, was applied.

    Raises ApiError 415 for an encoding that is not known, 400 for a body that is not so encoded, 413 for one that
    unpacks to more than `limit` bytes.
    """
    names = [name for word in encoding.decode("latin-1").split(",") if (name := word.strip().lower()) != "identity"]
    for name in reversed(names):
        if name not in _KNOWN:
            raise ApiError(415, f"content-encoding {name[:64]!r} is not supported; gzip and deflate are")
        body = _unpacked(body, name, limit)
    return body


def _unpacked(body: bytes, name: str, limit: int) -> bytes:
    parts: list[bytes] = []
    left = limit
    while body or not parts:
        unpacking = zlib.decompressobj(_EITHER)
        try:
            parts.append(unpacking.decompress(body, left + 1))
        except zlib.error as failure:
            raise ApiError(400, f"the body is not {name} as its content-encoding says: {failure}") from None
        left -= len(parts[-1])
        if left < 0:
            raise ApiError(413, f"the body is larger than {limit} bytes when unpacked")
        if not unpacking.eof:
            raise ApiError(400, f"the body ends within its {name} data")
        # A gzip file may have several members, one after the other.
        body = unpacking.unused_data
    return b"".join(parts)
