"""The supervisor's calls to engines, over real sockets: made again after a failure, in bounded number."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from pdctl.adapters import NoControl
from pdctl.supervisor.service.kv import _CALL_TRIES, KvWatch, Member

Said = list[tuple[str, str]]


class Front:
    """An engine's front that answers with `statuses` in turn, then with 200. `calls`: path and body of each."""

    def __init__(self, *statuses: int) -> None:
        self.calls: list[tuple[str, dict[str, object]]] = []
        self._statuses = list(statuses)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-l"))
                path, body = head.split()[1].decode(), await reader.readexactly(length)
                self.calls.append((path, msgspec.json.decode(body)))
                status = self._statuses.pop(0) if self._statuses else 200
                answer = body if path.endswith("role") else b'{"released":3,"followed":2}'
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(answer), answer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def with_front(front: Front, act: Callable[[KvWatch], Awaitable[None]], kind: str = "builtin") -> Said:
    """What is reported while `act` runs on a service whose only engine is a prefill engine with this front."""
    said: Said = []

    async def run() -> None:
        async with await asyncio.start_server(front.serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            member = Member("p0", kind, "prefill", "127.0.0.1", port, "e1")
            watch = KvWatch("s", lambda: [member], lambda: {member.holder}, lambda *words: said.append(words))
            async with asyncio.timeout(60):
                await act(watch)
            watch.close()

    asyncio.run(run())
    return said


def test_a_role_is_told_again_after_a_failure() -> None:
    front = Front(503, 500)
    assert with_front(front, lambda watch: watch.tell_role("p0")) == []
    assert front.calls == [("/pdctl/v1/role", {"role": "prefill", "epoch": 0})] * 3


def test_an_engine_that_takes_no_role_is_reported_once() -> None:
    front = Front(*[503] * 20)
    [(name, message)] = with_front(front, lambda watch: watch.tell_role("p0"))
    assert (name, len(front.calls)) == ("p0", _CALL_TRIES)
    assert message.startswith("did not accept the role prefill: status 503")


def test_leases_of_a_dead_holder_are_released_again_after_a_failure() -> None:
    front = Front(503)
    said = with_front(front, lambda watch: watch.reclaim("d0", "d0@e1"))
    assert said == [("p0", "released 3 leases of d0@e1")]
    assert front.calls == [("/pdctl/v1/holders/release", {"holder": "d0@e1"})] * 2


def test_leases_that_cannot_be_released_are_reported() -> None:
    front = Front(*[503] * 20)
    [(_, message)] = with_front(front, lambda watch: watch.reclaim("d0", "d0@e1"))
    assert len(front.calls) == _CALL_TRIES
    assert "they will expire" in message


def test_a_kind_without_the_abilities_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    front = Front()
    monkeypatch.setattr("pdctl.supervisor.service.kv.control", lambda kind: NoControl())

    async def everything(watch: KvWatch) -> None:
        await watch.tell_role("p0")
        await watch.reclaim("d0", "d0@e1")
        await watch.link("p0")
        assert await watch.states() == {}
        assert not (await watch.revoke("e1.1")).ok
        assert "do not report their state" in str(await watch.state_of("p0"))

    assert with_front(front, everything, kind="vllm") == []
    assert front.calls == []


def test_engines_elsewhere_hear_of_a_death_over_a_connection_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdctl.supervisor.service.kv._STAY_S", 0.01)
    connections, paths = list[asyncio.StreamWriter](), list[str]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                paths.append(head.split()[1].decode())
                lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-l")]
                await reader.readexactly(sum(lengths))
                writer.write(b'HTTP/1.1 200 X\r\ncontent-length: 14\r\n\r\n{"released":0}')
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def run() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, asyncio.timeout(60):
            far = Member("p0", "builtin", "prefill", "127.0.0.1", server.sockets[0].getsockname()[1], "e1")
            silent = Member("p1", "builtin", "prefill", "127.0.0.1", 1, "e1")
            near = Member("d0", "builtin", "decode", "127.0.0.1", 2, "e2")
            watch = KvWatch("s", lambda: [near], set, lambda *words: None, remote=lambda: [far, silent])
            staying = asyncio.create_task(watch.stay_connected_forever())
            while len(paths) < 3:
                await asyncio.sleep(0)
            monkeypatch.setattr("pdctl.supervisor.service.kv._STAY_S", 1000.0)
            while not watch.target(far).pool._idle:
                await asyncio.sleep(0)
            staying.cancel()
            await watch.reclaim("d0", "d0@e2")
            watch.close()
            while any(not writer.is_closing() for writer in connections):
                await asyncio.sleep(0)

    asyncio.run(run())
    assert paths == ["/health"] * (len(paths) - 1) + ["/pdctl/v1/holders/release"]
    assert len(connections) == 1


def test_engines_that_fetch_prefixes_are_told_of_all_others_of_their_kind() -> None:
    front = Front(503)
    others = [Member("p1", "builtin", "prefill", "h", 2, "e2"), Member("v", "vllm", "prefill", "h", 3, "e3")]
    far = [Member("b0", "builtin", "prefill", "h", 4, "e4", fetches=True)]

    async def run() -> None:
        async with await asyncio.start_server(front.serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            member = Member("p0", "builtin", "prefill", "127.0.0.1", port, "e1", fetches=True)
            watch = KvWatch("s", lambda: [member, *others], set, lambda *words: None, remote=lambda: far)
            async with asyncio.timeout(60):
                await watch.link("p1")
            watch.close()

    asyncio.run(run())
    peers = [{"name": name, "host": "h", "port": port, "epoch": epoch} for name, port, epoch in
             (("p1", 2, "e2"), ("b0", 4, "e4"))]  # fmt: skip
    assert front.calls == [("/pdctl/v1/neighbours", {"peers": peers})] * 2
