"""Calls between this service's own processes, with the secret: one JSON message out, one in."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from pdctl.net.http_client import ConnectionPool, Response, Unreachable, header_lines

Reply = TypeVar("Reply", bound=msgspec.Struct)


class CallRefused(Unreachable):
    """The peer answered with an error or an unexpected message."""


class Caller:
    """Makes calls with the run's secret. Raises Unreachable, or CallRefused for an unexpected answer."""

    def __init__(self, secret: str) -> None:
        self._headers = header_lines({"authorization": f"Bearer {secret}", "content-type": "application/json"})

    async def get(self, pool: ConnectionPool, path: str, kind: type[Reply], timeout_s: float) -> Reply:
        """GET a message."""
        return await self._call(pool, "GET", path, b"", kind, timeout_s)

    async def fetch(self, pool: ConnectionPool, path: str, timeout_s: float) -> Response:
        """GET something that is not one of our messages. Raises Unreachable only for a call without an answer."""
        return await pool.request("GET", path, self._headers, b"", timeout_s)

    async def post(
        self, pool: ConnectionPool, path: str, message: msgspec.Struct, kind: type[Reply], timeout_s: float
    ) -> Reply:
        """POST a message and return the reply."""
        return await self._call(pool, "POST", path, msgspec.json.encode(message), kind, timeout_s)

    async def _call(
        self, pool: ConnectionPool, method: str, path: str, body: bytes, kind: type[Reply], timeout_s: float
    ) -> Reply:
        answer = await pool.request(method, path, self._headers, body, timeout_s)
        if answer.status != 200:
            raise CallRefused(f"status {answer.status}: {answer.body[:200].decode(errors='replace')}")
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            raise CallRefused(f"the answer is not a {kind.__name__}: {failure}") from failure
