"""Compressed request bodies: decompressed within limits, or refused."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.net.content_encoding import decoded, unpacked
from pdctl.net.openai.api import ApiError

# Without the time, which would appear in a test's name and differ between test processes.
packed = partial(gzip.compress, mtime=0)


@given(st.binary(max_size=2000))
def test_what_was_packed_comes_back(body: bytes) -> None:
    assert decoded(packed(body), b"gzip", 2000) == body
    assert decoded(zlib.compress(body), b"deflate", 2000) == body
    assert decoded(packed(zlib.compress(body)), b"Deflate, X-GZIP", 4000) == body
    assert decoded(packed(body[:9]) + packed(body[9:]), b"gzip", 2000) == body
    assert decoded(body, b"identity", 0) == body


def test_large_bodies_are_unpacked_in_a_thread() -> None:
    body = bytes(range(256)) * 64

    async def found() -> tuple[bytes, bytes]:
        return await unpacked(packed(body), b"gzip", 20_000), await unpacked(body, b"identity", 20_000)

    assert asyncio.run(found()) == (body, body)
    with pytest.raises(ApiError):
        asyncio.run(unpacked(packed(body), b"gzip", 10))


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (b"x", b"br", 415),
        (b"x", b"gzip, zstd", 415),
        (b"x", b"\xff", 415),
        (b"{}", b"gzip", 400),
        (b"", b"gzip", 400),
        (packed(b"x" * 100)[:-4], b"gzip", 400),
        (packed(b"x") + b"junk", b"gzip", 400),
        (packed(bytes(10**7)), b"gzip", 413),
        (packed(packed(bytes(10**6))), b"gzip, gzip", 413),
        (packed(b"x" * 600) + packed(b"x" * 600), b"gzip", 413),
        (packed(b"") * 17, b"gzip", 400),
        (packed(b"") * 500_000, b"gzip", 400),
        (packed(packed(packed(b"x"))), b"gzip, gzip, gzip", 415),
        (b"x", b"gzip," * 10_000, 415),
    ],
)
def test_what_cannot_be_unpacked_is_refused(body: bytes, encoding: bytes, status: int) -> None:
    with pytest.raises(ApiError) as found:
        decoded(body, encoding, 1000)
    assert found.value.status == status
