"""One GET over a unix socket, without an HTTP library: for processes that ask the supervisor one thing now and then."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pdctl.net.http_client import Unreachable

_END_OF_HEAD = b"\r\n\r\n"


async def get(socket: Path, path: str, timeout_s: float, most_bytes: int) -> bytes:
    """The body of an answer with status 200. Raises Unreachable for every other end."""
    where = f"{socket}{path}"
    try:
        async with asyncio.timeout(timeout_s):
            return await _get(socket, path, most_bytes)
    except TimeoutError:
        raise Unreachable(f"{where} did not answer within {timeout_s:g} s", sent=True) from None
    except (OSError, ValueError) as failure:
        raise Unreachable(f"{where}: {failure}") from None


async def _get(socket: Path, path: str, most_bytes: int) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(socket), limit=64 * 1024)
    try:
        # HTTP/1.0: the server neither uses chunks nor keeps the connection, so the body ends with it.
        writer.write(f"GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n".encode())
        answer = bytearray()
        while data := await reader.read(64 * 1024):
            answer += data
            if len(answer) > most_bytes:
                raise ValueError(f"the answer has more than {most_bytes} bytes")
    finally:
        writer.transport.abort()
    head, end, body = bytes(answer).partition(_END_OF_HEAD)
    status = head.split(maxsplit=2)
    if not end or len(status) < 2 or status[1] != b"200":
        raise ValueError(f"the answer is {head.splitlines()[:1]!r}")
    return body
