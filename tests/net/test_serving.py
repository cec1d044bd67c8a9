from __future__ import annotations

import asyncio
import socket

import pytest

from pdctl.net.serving import listen_tcp


def test_accepted_connections_do_not_wait_for_acknowledgements() -> None:
    """asyncio sets TCP_NODELAY on accepted connections, but not with sockets from socket.create_server."""

    async def main() -> int:
        observed: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raw = writer.get_extra_info("socket")
            observed.set_result(raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen_tcp("127.0.0.1", 0)
        async with await asyncio.start_server(accepted, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            found = await observed
            await reader.read()
            writer.close()
            await writer.wait_closed()
        return found

    assert asyncio.run(main()) == 1


def test_a_taken_port_is_an_error_and_leaks_nothing() -> None:
    with listen_tcp("127.0.0.1", 0) as first, pytest.raises(OSError, match="in use"):
        listen_tcp("127.0.0.1", first.getsockname()[1])
