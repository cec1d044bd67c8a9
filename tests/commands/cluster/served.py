"""A cluster of two nodes that run nothing, for the commands of one of them: real servers, in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
from typer.testing import CliRunner

from pdctl.cli import app
from pdctl.control_api import MeasuredProcess, MeasuredStatus, RegistryStatus, Verb
from pdctl.errors import PdctlError
from pdctl.plan.changes import Changes
from pdctl.supervisor.cluster.entries import Order, TopologyEntry
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.surface.cluster.merge import ClusterFacts
from pdctl.supervisor.surface.control import serve_control
from pdctl.topology.loader import load_cluster_text
from tests.supervisor.surface.cluster.nodes import Cluster, Part, Published, cluster, process

SERVICE = "fleet"
Result = TypeVar("Result")

TEXT = """\
[service]
name = "fleet"
model = "m"

[cluster]
etcd = ["http://127.0.0.1:1"]
interface = "127.0.0.0/8"
secret_file = "secret"

[[engines]]
name = "prefill"
role = "prefill"
replicas = 2   # both

[[engines]]
name = "decode"
role = "decode"
"""


class Living(Part):
    """A node's part whose processes are ready some looks after they were started."""

    looks = 0

    def ask(self, name: str, verb: Verb, drain: bool) -> str:
        reason = super().ask(name, verb, drain)
        if not reason and verb == "restart":
            self.put(name, epoch="0-2", restarts=1, state="starting")
        elif not reason:
            self.put(name, state={"stop": "stopped", "drain": "drained", "start": "ready"}[verb])
        return reason

    def put(self, name: str, **changed: object) -> None:
        self.processes = tuple(
            msgspec.structs.replace(one, **changed) if one.name == name else one for one in self.processes
        )

    def _status(self) -> MeasuredStatus:
        found = super()._status()
        self.looks += 1
        for one in self.processes if self.looks % 4 == 0 else ():
            if one.state == "starting":
                self.put(one.name, state="ready")
        return found


class Places(Published):
    """Places engines on the nodes in turn, and a proxy on each."""

    def __init__(self, parts: dict[str, Part]) -> None:
        super().__init__(tuple(parts))
        self.parts = parts
        # Of a node: why it obeys no order.
        self.refusing: dict[str, str] = {}
        # How often etcd does not answer, once something is published.
        self.silent = 0

    async def orders(self, text: str, source: str) -> tuple[Order, ...]:
        if self.silent and self.now.text == text:
            self.silent -= 1
            raise PdctlError("etcd does not answer: 10.0.0.1:2379", "nothing can be changed until it does")
        entry = TopologyEntry(text, source) if text else None
        names = [name for group in load_cluster_text(text, source).engines for name in group.replica_names()]
        if len(names) > 6:
            raise PdctlError("no node has room for decode-4", "add a node")
        return tuple(
            Order(1, node, entry, tuple(names[number :: len(self.nodes)])) for number, node in enumerate(self.nodes)
        )

    async def publish(self, text: str, source: str, revision: int | None) -> int:
        orders = await self.orders(text, source)
        for order in orders:
            wanted = {"proxy", *order.engines}
            part = self.parts[order.node]
            kept = [one for one in part.processes if one.name in wanted]
            new = [_starting(name) for name in sorted(wanted - {one.name for one in kept})]
            part.processes = (*kept, *new)
        return await super().publish(text, source, revision)

    async def withdraw(self) -> None:
        for part in self.parts.values():
            part.processes = ()
        await super().withdraw()

    async def preview(self, order: Order) -> Changes:
        if reason := self.refusing.get(order.node):
            raise PdctlError(reason)
        before = {one.name for one in self.parts[order.node].processes}
        wanted = {"proxy", *order.engines}
        return Changes(
            added=tuple(sorted(wanted - before)),
            removed=tuple(sorted(before - wanted)),
            unchanged=tuple(sorted(wanted & before)),
        )


def _starting(name: str) -> MeasuredProcess:
    return process(name, name.rpartition("-")[0] or name, "starting")


@dataclass
class Said:
    """What a command printed, and the error that ended it."""

    out: str
    told: str
    failure: BaseException | None

    @property
    def error(self) -> str:
        assert isinstance(self.failure, PdctlError), (self.failure, self.out, self.told)
        return f"{self.failure.message} | {self.failure.hint}"


class Served:
    """The cluster, and a command line on its node a."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.a = Living(folder, "a", "127.0.0.20", process("prefill-0", "prefill"), process("proxy", "proxy"))
        self.b = Living(folder, "b", "127.0.0.21", process("decode-0"), process("proxy", "proxy"))
        for part in (self.a, self.b):
            part.plan = replace(part.plan, node=part.node)
        self.cluster: Cluster
        self.places: Places
        self._loop = asyncio.new_event_loop()
        self._ready, self._over = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def run(self, *words: str) -> Said:
        """Run a command."""
        done = CliRunner().invoke(app, list(words))
        assert done.exception is None or isinstance(done.exception, (PdctlError, SystemExit)), done.exception
        return Said(done.stdout, done.stderr, done.exception)

    def good(self, *words: str) -> str:
        """What a command that succeeds prints."""
        said = self.run(*words)
        assert said.failure is None, (said.failure, said.told)
        return said.out

    def end(self, node: str) -> None:
        """The agent of a node ends."""
        done: Future[None] = asyncio.run_coroutine_threadsafe(self.cluster.end(node), self._loop)
        done.result()

    def know(self, facts: ClusterFacts) -> None:
        self.cluster.facts = facts

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        run_dir = RunDir(self.folder / "run" / SERVICE)
        run_dir.acquire()
        async with cluster(self.a, self.b) as self.cluster:
            self.places = Places(self.cluster.parts)
            # The agents' servers call it too.
            self.cluster.control._publishing = self.places
            self.cluster.published.preview = self.places.preview  # type: ignore[method-assign]
            serving = asyncio.create_task(serve_control(run_dir.control_socket, self.cluster.control))
            self.know(ClusterFacts(RegistryStatus(ok=True), "a"))
            self._ready.set()
            await self._over.wait()
            serving.cancel()
            await asyncio.wait([serving])
        run_dir.release()


@contextmanager
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("PDCTL_RUN", str(folder / "run"))
    monkeypatch.setenv("PDCTL_STATE", str(folder / "state"))
    monkeypatch.delenv("PDCTL_FILE", raising=False)
    monkeypatch.chdir(folder)
    found = Served(folder)
    found.start()
    try:
        yield found
    finally:
        found.stop()
