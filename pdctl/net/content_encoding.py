"""Compressed request bodies (RFC 9110, 8.4), bounded by what they unpack to and by how often they are packed."""

from __future__ import annotations

import zlib

import anyio.to_thread

from pdctl.net.openai_api import ApiError

# One client packs once; each further time, and each further member of a gzip body, costs as much as the first.
_MAX_ENCODINGS, _MAX_MEMBERS = 2, 16
# Bodies of fewer packed bytes than this are unpacked at once: even the best packed ones take a few milliseconds.
_SMALL = 4096

# zlib's own header or gzip's, whichever comes: some clients call zlib's format deflate, as the RFC does.
_EITHER = 32 + zlib.MAX_WBITS
_KNOWN = frozenset({"gzip", "x-gzip", "deflate"})


async def unpacked(body: bytes, encoding: bytes, limit: int) -> bytes:
    """As `decoded`; a large body in a thread, so that other requests' tokens go on meanwhile."""
    if len(body) < _SMALL:
        return decoded(body, encoding, limit)
    return await anyio.to_thread.run_sync(decoded, body, encoding, limit)


def decoded(body: bytes, encoding: bytes, limit: int) -> bytes:
    """The body as it was before `encoding`, the header's value, was applied.

    Raises ApiError 415 for an encoding that is not known and for more than two, 400 for a body that is not so encoded,
    413 for one that unpacks to more than `limit` bytes.
    """
    names = [name for word in encoding.decode("latin-1").split(",") if (name := word.strip().lower()) != "identity"]
    if len(names) > _MAX_ENCODINGS:
        raise ApiError(415, f"{len(names)} content-encodings; {_MAX_ENCODINGS} is the most")
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
            raise ApiError(400, f"the body is not {name} as its content-encoding says: {failure}") from None
        left -= len(parts[-1])
        if left < 0:
            raise ApiError(413, f"the body is larger than {limit} bytes when unpacked")
        if not unpacking.eof:
            raise ApiError(400, f"the body ends within its {name} data")
        # A gzip file may have several members, one after the other.
        body = unpacking.unused_data
    return b"".join(parts)
