"""The process that shares a proxy's descriptors: what the proxy had accepted is not lost with it, whenever it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pdctl.net.keeping import TAKEOVER_ENV
from pdctl.proxy.takeover import sharer
from pdctl.supervisor.process.keeper import Keeper
from pdctl.wire import LISTEN_FD_ENV
from tests.proxy.takeover.test_server import GET, Served, ask, plain, until

# A proxy's beginning. Then it accepts, and does nothing with what it has accepted.
_PROXY = """
import os, signal, socket, sys
from pdctl.proxy.takeover.sharer import share_descriptors
share_descriptors()
listener = socket.socket(fileno=int(os.environ["PDCTL_LISTEN_FD"]))
engine = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
channel = int(os.environ["PDCTL_TAKEOVER"].partition(",")[0])
accepted = [listener.accept()[0] for _ in range(int(sys.argv[1]))]
if "loses its supervisor" in sys.argv:
    os.dup2(accepted[0].fileno(), channel)
if "reads" in sys.argv:
    assert accepted[0].recv(1) == b"G"
print("accepted", flush=True)
signal.pause()
"""


@contextlib.contextmanager
def proxy(served: Served, accepts: int, engine: int, *how: str) -> Iterator[subprocess.Popen[str]]:
    channel, memory = served.keeper.hand_over()
    listener = served.listener.fileno()
    environment = {TAKEOVER_ENV: f"{channel.fileno()},{memory},8", LISTEN_FD_ENV: str(listener)}
    with channel:
        started = subprocess.Popen(
            [sys.executable, "-c", _PROXY, str(accepts), str(engine), *how], env={**os.environ, **environment},
            pass_fds=[channel.fileno(), memory, listener], stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    try:
        yield started
    finally:
        started.kill()
        started.wait(60)
        assert started.stdout is not None
        started.stdout.close()


async def accepted(started: subprocess.Popen[str]) -> None:
    assert started.stdout is not None
    assert await asyncio.to_thread(started.stdout.readline) == "accepted\n"


async def end(started: subprocess.Popen[str], sign: signal.Signals, keeper: Keeper) -> None:
    started.send_signal(sign)
    await keeper.told_all()
    keeper.ended()


def tried(work: object) -> None:
    async def main() -> None:
        with contextlib.closing(Served(plain)) as served, socket.create_server(("127.0.0.1", 0)) as engine:
            served.listener.setblocking(True)
            await work(served, engine)  # type: ignore[operator]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["keeps its supervisor", "loses its supervisor"])
def test_a_proxy_dies_when_it_has_just_accepted_and_the_next_one_answers(how: str) -> None:
    """Also one that has closed its channel: a client's connection has its number then."""

    async def work(served: Served, engine: socket.socket) -> None:
        with proxy(served, 3, engine.getsockname()[1], how) as first:
            there, _ = engine.accept()
            streams = [await served.connect() for _ in range(3)]
            await accepted(first)
            [helper] = psutil.Process(first.pid).children()
            await end(first, signal.SIGKILL, served.keeper)
            assert served.keeper.held == 3
            await until(lambda: not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE)
        with there:
            there.settimeout(60)
            assert there.recv(1) == b"", "connections to engines end"
        async with served.running():
            for stream in streams:
                assert (await ask(stream, GET % b"", b"text")).startswith(b"HTTP/1.1 200 OK")
        [report] = served.told
        assert (report.connections, report.cut) == (3, 0)

    tried(work)


def test_what_was_read_by_a_proxy_that_is_gone_is_nothing_to_go_on_with() -> None:
    """The keeper has it already, with a slot; or the connection ends with the proxy, as one without a slot does."""

    async def work(served: Served, engine: socket.socket) -> None:
        with proxy(served, 2, engine.getsockname()[1], "reads") as first:
            there, _ = engine.accept()
            read, new = await served.connect(), await served.connect()
            for _, client in (read, new):
                client.write(b"GET")
            await accepted(first)
            await end(first, signal.SIGKILL, served.keeper)
            there.close()
            assert served.keeper.held == 1
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(read[0].readexactly(1), 60)
            for _, client in (read, new):
                client.close()
                with contextlib.suppress(ConnectionError):
                    await client.wait_closed()

    tried(work)


def test_a_container_that_refuses_clone3_allows_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Libc:
        def syscall(self, number: object, *arguments: object) -> int:
            asked.append(getattr(number, "value", number))  # type: ignore[arg-type]
            return -1 if len(asked) == 1 else 77

    monkeypatch.setattr(sharer, "_libc", Libc())
    assert sharer._clone() == 77
    assert asked == [435, {"x86_64": 56, "aarch64": 220}[platform.machine()]]


_CLONE = """
import os
from pdctl.proxy.takeover import sharer
sharer._SYS_CLONE3 = -1
ours, theirs = os.pipe()
pid = sharer._clone()
if pid == 0:
    os.close(theirs)  # for both
    os._exit(7)
assert pid > 0
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
try:
    os.fstat(theirs)
except OSError:
    print("closed")
"""


def test_clone_makes_the_same_process_as_clone3() -> None:
    """The kernel has no call of the other's number then. In a process that has one thread, as a proxy has."""
    done = subprocess.run([sys.executable, "-c", _CLONE], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("closed\n", "")


def test_it_ends_with_a_proxy_that_has_no_connections() -> None:
    async def work(served: Served, engine: socket.socket) -> None:
        with proxy(served, 0, engine.getsockname()[1]) as first:
            there, _ = engine.accept()
            await accepted(first)
            await end(first, signal.SIGTERM, served.keeper)
            there.close()
        assert served.keeper.held == 0
        assert served.keeper.refused == 0

    tried(work)


def test_what_it_tells_again_is_kept_once() -> None:
    """Most connections are known already; the keeper has as many descriptors as before."""

    async def work(served: Served, engine: socket.socket) -> None:
        channel, _ = served.keeper.hand_over()
        client = socket.create_connection(served.listener.getsockname())
        connection, _ = served.listener.accept()
        with client, channel, connection:
            sharer._tell(channel, connection.fileno())
            await until(lambda: served.keeper.held == 1)
            before = len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(3):
                sharer._tell(channel, connection.fileno())
            await until(lambda: len(list(Path("/proc/self/fd").iterdir())) == before)
        await served.keeper.told_all()
        served.keeper.ended()
        assert (served.keeper.held, served.keeper.refused) == (1, 0)

    tried(work)


def test_without_takeover_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TAKEOVER_ENV, raising=False)
    monkeypatch.setattr(sharer, "_clone", lambda: pytest.fail("no process is wanted"))
    sharer.share_descriptors()


def test_a_kernel_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv(TAKEOVER_ENV, f"{listener.fileno()},9,9")
        monkeypatch.setenv(LISTEN_FD_ENV, str(listener.fileno()))
        monkeypatch.setattr(os, "listdir", lambda path: ["1"])
        monkeypatch.setattr(sharer, "_clone", lambda: -1)
        sharer.share_descriptors()
        assert "connections that have just been accepted are lost if this proxy dies: clone:" in capfd.readouterr().err
        monkeypatch.setattr(os, "listdir", lambda path: ["1", "2"])
        monkeypatch.setattr(sharer, "_clone", lambda: pytest.fail("a thread may hold a lock"))
        sharer.share_descriptors()
    assert "this process has threads already" in capfd.readouterr().err
