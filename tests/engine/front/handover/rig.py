"""A decode engine's receiver between a simulated core and a simulated prefill engine, over real sockets.

The cores exchange messages with the front over the front's own sockets. The prefill engine answers from a real lease
desk, unless the test sets another answer for a call.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq
import zmq.asyncio

from pdctl.engine.front.core_client import CoreClient, RequestEvents
from pdctl.engine.front.handover.lease_desk import LeaseDesk
from pdctl.engine.front.handover.links import LinkBook
from pdctl.engine.front.handover.peers import Peers
from pdctl.engine.front.handover.receiver import KvLost, Receiver
from pdctl.engine.front.handover.trace import Trace
from pdctl.engine.handover.lease import Lease, LeaseTable
from pdctl.engine.handover.reception import ReceptionEvent
from pdctl.engine.ipc import pipes
from pdctl.engine.ipc.messages import FromCore, Poke, Sampling, Submit, ToCore
from pdctl.engine.options import parse
from pdctl.wire import (
    HandOver,
    KvEndpoint,
    LayerShape,
    LeaseCall,
    LeaseReply,
    Manifest,
    Offer,
    PoolEndpoint,
    RenewCall,
    RenewReply,
    Served,
)

HOLDER = "d0@de"
SECRET = "s3cret"
TOKENS = 8
_MANIFEST = Manifest("m", "float32", 4, [LayerShape(1, 2, 2)])
ENDPOINT = KvEndpoint((PoolEndpoint("host", [Served("shm", "p", "shm")], 9, _MANIFEST),))

Message = TypeVar("Message")
Reply = LeaseReply | RenewReply
# Answers a call at the prefill engine; None ends the connection without an answer.
Act = Callable[[LeaseCall | RenewCall], Awaitable[Reply | None]]


class Core:
    """A front's link to its core, and the core's end of the sockets."""

    def __init__(self, name: str, run_dir: Path) -> None:
        (run_dir / "ipc").mkdir(exist_ok=True)
        options = parse(["--name", name, "--model", "m", "--port", "1", "--run-dir", str(run_dir)])
        self.link = CoreClient(options)
        self._context = zmq.asyncio.Context()
        self._in: zmq.asyncio.Socket = self._context.socket(zmq.PULL)
        self._address = pipes.to_core(run_dir, name)
        self._out: zmq.asyncio.Socket = self._context.socket(zmq.PUSH)
        self._out.connect(pipes.from_core(run_dir, name))
        self._decoder: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore)

    def listen(self) -> None:
        """Connect. Until then, the front's messages wait."""
        self._in.connect(self._address)

    async def any(self) -> ToCore:
        """The next message from the front."""
        return self._decoder.decode(await self._in.recv())

    async def next(self, kind: type[Message]) -> Message:
        """The next message from the front, which must be of this kind."""
        found = await self.any()
        assert isinstance(found, kind), found
        return found

    async def hears_nothing(self) -> None:
        """Check that no other message is queued: the next one is the Poke sent here."""
        await self.link.send(Poke())
        await self.next(Poke)

    async def say(self, message: FromCore) -> None:
        await self._out.send(msgspec.msgpack.encode(message))

    async def close(self) -> None:
        await self.link.close()
        self._in.close(linger=0)
        self._out.close(linger=0)
        self._context.term()


class Told(Trace):
    """A trace that the test reads: the events of each lease."""

    def __init__(self) -> None:
        super().__init__("d0", "de")
        self._events: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._passed: list[tuple[str, str]] = []

    def write(self, event: str, lease_id: str, **details: object) -> None:
        self._events.put_nowait((str(details.get("on", event)), lease_id))

    async def until(self, event: ReceptionEvent | str, lease_id: str) -> None:
        """Wait for a reception event, or for another trace event. It may have come before one that was waited for."""
        wanted = (event.value if isinstance(event, ReceptionEvent) else event, lease_id)
        while wanted not in self._passed:
            self._passed.append(await self._events.get())
        self._passed.remove(wanted)


class Prefill:
    """A prefill engine's lease calls. `acts`: the test's answers, one per call of a verb; then the desk answers.

    `calls`: received calls in order. The test takes them from this queue.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self.desk = LeaseDesk(LeaseTable("pe", 600.0), core.link, Trace("p0", "pe"))
        self.acts: dict[str, deque[Act]] = {}
        self.calls: asyncio.Queue[tuple[str, LeaseCall | RenewCall]] = asyncio.Queue()
        self.port = 0
        self._connections: set[asyncio.Task[object]] = set()

    def grant(self, sealed: bool = True) -> Lease:
        """A lease on two blocks, as after a prefill or, if not `sealed`, during one."""
        lease = self.desk.grant("r-at-prefill", 2, "proxy", "a1", sealed)
        assert lease is not None
        return lease

    def act(self, verb: str, *acts: Act) -> None:
        self.acts.setdefault(verb, deque()).extend(acts)

    async def call(self, verb: str) -> LeaseCall | RenewCall:
        """The next call, which must be of this verb."""
        found, call = await self.calls.get()
        assert found == verb, (found, call)
        return call

    async def answer(self, verb: str, call: LeaseCall | RenewCall) -> Reply:
        """The answer of a real engine."""
        if isinstance(call, RenewCall):
            return self.desk.renew(call)
        acts = {"claim": self.desk.claim, "commit": self.desk.commit, "release": self.desk.release}
        return acts[verb](call)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await asyncio.sleep(0)  # transports close in the loop's next turn

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the test is over
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert f"authorization: Bearer {SECRET}\r\n" in head
        verb = head.split()[1].removeprefix("/pdctl/v1/leases/")
        length = re.search(r"content-length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        call: LeaseCall | RenewCall = (
            msgspec.json.decode(body, type=RenewCall) if verb == "renew" else msgspec.json.decode(body, type=LeaseCall)
        )
        self.calls.put_nowait((verb, call))
        acts = self.acts.get(verb)
        reply = await acts.popleft()(call) if acts else await self.answer(verb, call)
        if reply is None:
            return False
        data = msgspec.json.encode(reply)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))
        await writer.drain()
        return True


async def cut(_: LeaseCall | RenewCall) -> None:
    """No answer."""


class Reader:
    """A request that decodes from a hand-over. `begun`: its id in the core and its events, once it can decode."""

    def __init__(self, receiver: Receiver, given: HandOver, request_id: str, deadline_s: float) -> None:
        self.stages: dict[str, float] = {}
        self.begun: asyncio.Future[tuple[str, RequestEvents]] = asyncio.get_running_loop().create_future()
        self._leaves = asyncio.Event()
        submit = Submit(request_id, [1] * (TOKENS + 1), TOKENS, Sampling(max_tokens=4), await_kv=True, kv_tokens=TOKENS)
        self.task = asyncio.ensure_future(self._run(receiver, submit, given, deadline_s))

    async def _run(self, receiver: Receiver, submit: Submit, given: HandOver, deadline_s: float) -> None:
        try:
            async with receiver.decoding(submit, given, deadline_s, self.stages) as found:
                self.begun.set_result(found)
                await self._leaves.wait()
        finally:
            self.begun.cancel()

    async def lost(self) -> str:
        """Why its KV was lost."""
        try:
            await self.task
        except KvLost as failure:
            return str(failure)
        raise AssertionError("its KV was not lost")

    async def leave(self) -> None:
        self._leaves.set()
        await self.task


@dataclass
class Rig:
    core: Core
    prefill: Prefill
    peers: Peers
    links: LinkBook
    receiver: Receiver
    told: Told
    readers: list[Reader] = field(default_factory=list)

    def given(self, lease: Lease, lease_s: float = 600.0) -> HandOver:
        """A prefill's answer."""
        return HandOver(
            "p0", lease.request_id, "127.0.0.1", self.prefill.port, [1, 2], TOKENS, "", lease.lease_id, "pe",
            lease_s, 7, ENDPOINT,
        )  # fmt: skip

    def offer(
        self, lease: Lease, readable: int, withdrawn: bool = False, lease_s: float = 600.0,
        token_ids: list[int] | None = None, salt: str = "",
    ) -> LeaseReply:  # fmt: skip
        """Offer the receiver the blocks that it can read early."""
        return self.receiver.offer(
            Offer(
                "p0", "127.0.0.1", self.prefill.port, lease.lease_id, "pe", lease_s, TOKENS, readable, [1, 2],
                ENDPOINT, withdrawn, token_ids or [], salt,
            )
        )  # fmt: skip

    def reader(self, given: HandOver, request_id: str = "r1", deadline_s: float = 600.0) -> Reader:
        made = Reader(self.receiver, given, request_id, deadline_s)
        self.readers.append(made)
        return made


class _Over(Exception):
    """Ends the receiver's tasks at the end of the test."""


@asynccontextmanager
async def rig(renews: bool = False, core_listens: bool = True) -> AsyncIterator[Rig]:
    """`renews`: leases are renewed, as in an engine. `core_listens`: if false, the test connects the core itself."""
    # A socket's path is limited to about 100 bytes, and the paths of pytest's folders are longer.
    run_dir = Path(tempfile.mkdtemp(prefix="pd-"))
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, run_dir)
        cores = [Core(name, run_dir) for name in ("d0", "p0")]
        for core in cores:
            stack.push_async_callback(core.close)
        cores[1].listen()
        if core_listens:
            cores[0].listen()
        prefill = Prefill(cores[1])
        await stack.enter_async_context(prefill.listening())
        peers = Peers(HOLDER, SECRET)
        stack.callback(peers.close)
        try:
            async with asyncio.TaskGroup() as tasks:
                links, told = LinkBook(peers, cores[0].link), Told()
                made = Rig(cores[0], prefill, peers, links, Receiver(peers, cores[0].link, links, told, tasks), told)
                tasks.create_task(cores[0].link.receive())
                tasks.create_task(peers.release_forever())
                if renews:
                    tasks.create_task(made.receiver.renew_forever())
                yield made
                for reader in made.readers:
                    reader.task.cancel()
                await asyncio.gather(*(reader.task for reader in made.readers), return_exceptions=True)
                raise _Over
        except* _Over:
            pass
