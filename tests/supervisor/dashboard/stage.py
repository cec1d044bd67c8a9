"""A service that exists only for its page: GPUs, two hosts, a link on a fallback, a leak, a failover.

python -m tests.supervisor.dashboard.stage PORT serves it until Ctrl-C.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec

from pdctl.control_api import (
    AttachedStatus,
    ExitReport,
    KvStatus,
    LastExit,
    Lease,
    Link,
    MeasuredProcess,
    MeasuredStatus,
    ProcessStatus,
    RoleOrder,
    ServiceStatus,
    Verb,
)
from pdctl.host.devices.gpu import Gpu
from pdctl.net.serving import listen_tcp
from pdctl.proxy_wire import Counted, FailedTry, Figures, RecentRequest, RequestPhase
from pdctl.supervisor.dashboard import server
from pdctl.supervisor.dashboard.access import Gate
from pdctl.supervisor.dashboard.rates import Look
from pdctl.supervisor.dashboard.sampler import Sampler, Viewers
from pdctl.supervisor.rundir.journal import EVENTS, Journal
from pdctl.wire import EngineState

SECRET = "for a test"
GB = 10**9
BOUNDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
GPUS = tuple(Gpu(index=number, uuid=f"GPU-{number}", name="NVIDIA H200", memory=141 * GB) for number in range(4))
KILLED = LastExit(
    at="2026-01-01T00:00:00+00:00", code=None, signal="SIGKILL", reason="killed by SIGKILL", expected=False,
    by="another process", oom=False,
)  # fmt: skip


# Seconds ago, process, event, message.
_PAST = (
    (4012, "pdctl", "note", "service 'llama': 5 processes"),
    *((4011, name, "started", "starting") for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")),
    *((4008, name, "phase", "loading weights") for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")),
    (4002, "prefill-1", "phase", "capturing CUDA graphs"), (4002, "prefill-0", "ready", "ready"),
    (4001, "prefill-1", "ready", "ready"), (4001, "decode-0", "ready", "ready"), (4000, "decode-1", "ready", "ready"),
    (4000, "far", "note", "link to prefill-0: FALLBACK to tcp: mlx5_0 port 1 is down"),
    (4000, "far", "note", "link to prefill-1: FALLBACK to tcp: mlx5_0 port 1 is down"),
    (4000, "proxy", "started", "starting"), (3999, "proxy", "ready", "ready"),
    (3999, "pdctl", "service_ready", "service 'llama' is ready at http://127.0.0.1:8000"),
    (1210, "prefill-1", "asked", "restart requested, after a drain"), (1210, "prefill-1", "draining", "draining"),
    (1204, "prefill-1", "drained", "drained"), (1203, "prefill-1", "started", "starting"),
    (1195, "prefill-1", "ready", "ready"), (400, "decode-1", "exited", "killed by SIGKILL"),
    (400, "prefill-0", "note", "released 2 leases of decode-1@7f3a-1"), (399, "decode-1", "started", "starting"),
    (391, "decode-1", "ready", "ready"),
)  # fmt: skip


def past(entry: tuple[float, str, str, str]) -> str:
    back, name, event, message = entry
    return json.dumps({"at": now_text(back), "process": name, "event": event, "message": message}) + "\n"


def now_text(back_s: float = 0.0) -> str:
    return datetime.fromtimestamp(time.time() - back_s, UTC).isoformat(timespec="milliseconds")


def process(name: str, role: str, gpu: int | None = None, **changed: Any) -> ProcessStatus:
    found = ProcessStatus(
        name=name, kind="proxy" if role == "proxy" else "builtin", role=role, group=name.rpartition("-")[0] or name,
        state="ready", reason="", pid=4000 + sum(name.encode()), restarts=0, last_exit=None,
        device="cpu" if gpu is None else "cuda", cpus=(0, 1, 2, 3), gpus=() if gpu is None else (f"GPU-{gpu}",),
        rdma=(), ports={"http": 22900}, ready_since=now_text(4000), epoch="7f3a-1", adopted=False,
        log=f"/var/log/pdctl/{name}.log", phase="", phase_s=None,
    )  # fmt: skip
    return msgspec.structs.replace(found, **changed)


def link(peer: str, reader: str, **changed: Any) -> Link:
    found = Link(
        reader=reader, peer=peer, epoch="7f3a-1", transport="cuda_ipc", protocol="",
        reason="both GPUs are on this host", fallback="", error="", refused=False, pulls=1412, bytes=418 * GB,
        gbps=182.4,
    )  # fmt: skip
    return msgspec.structs.replace(found, **changed)


def request(number: int, failed: bool = False) -> RecentRequest:
    prefill, decode = f"prefill-{number % 2}", f"decode-{number % 2}"
    begun, shape = random.Random(number), 0.3 + number % 7 / 4
    queue, computed, handed = 0.002, begun.uniform(0.05, 0.2), begun.uniform(0.008, 0.03)
    at = [0.0, queue, queue + computed, queue + computed + handed]
    phases = [
        RequestPhase("queue", at[0], at[1]),
        RequestPhase("prefill", at[1], at[2], prefill),
        RequestPhase("hand_over", at[2], at[3], decode),
        RequestPhase("admission", at[3], at[3] + 0.002, decode),
        RequestPhase("first_step", at[3] + 0.002, at[3] + 0.03, decode),
        RequestPhase("decode", at[3] + 0.03, shape + 1, decode),
    ]
    tries: tuple[FailedTry, ...] = ()
    if failed:
        shift = 0.9
        tries = (FailedTry(shift, "decode-1", prefill, "decode-1", 31, "connection lost"),)
        phases = [phases[0], *(move(phase, shift) for phase in phases[1:])]
    return RecentRequest(
        id=f"5f0c2d1e9a7b4c6d8e{number:012x}", path="/v1/chat/completions", status=200,
        at=time.time() - 300 + number * 4, seconds=phases[-1].end_s, ttft_s=at[2],
        prompt_tokens=700 + 130 * (number % 9), cached_tokens=256 if number % 3 == 0 else 0,
        output_tokens=80 + 7 * number, prefill=prefill, decode=decode,
        phases=tuple(phases), failed=tries, hand_over_bytes=91_000_000,
    )  # fmt: skip


def move(phase: RequestPhase, by: float) -> RequestPhase:
    engine = "decode-0" if phase.engine.startswith("decode") else phase.engine
    return msgspec.structs.replace(phase, begin_s=phase.begin_s + by, end_s=phase.end_s + by, engine=engine)


class Stage:
    """What `serve_page` wants of a service. `asked`: the changes that the page wanted."""

    def __init__(self, folder: Path) -> None:
        # Of the plan, the page needs the topology file.
        self.plan: Any = SimpleNamespace(source="", node="")
        self.journal = Journal(folder, lambda process, message: None)
        self.asked: list[tuple[str, ...]] = []
        self.looked_at = 0.0
        self.processes = [
            process("prefill-0", "prefill", 0), process("prefill-1", "prefill", 1), process("decode-0", "decode", 2),
            process("decode-1", "decode", 3, restarts=2, last_exit=msgspec.structs.replace(KILLED, at=now_text(400))),
            process("proxy", "proxy", ports={"http": 8000}),
        ]  # fmt: skip
        self.attached = [
            AttachedStatus(name="far", role="decode", kind="vllm", host="10.20.0.7", port=8000, secret_file="",
                           answers=True, connector="nixl"),
        ]  # fmt: skip
        slow = {"transport": "nixl", "protocol": "tcp", "fallback": "mlx5_0 port 1 is down", "gbps": 2.1,
                "bytes": 9 * GB}  # fmt: skip
        self.links = [
            link("prefill-0", "decode-0"), link("prefill-0", "decode-1", gbps=176.0),
            link("prefill-1", "decode-0", gbps=181.2), link("prefill-1", "decode-1"),
            link("prefill-0", "far", **slow), link("prefill-1", "far", **slow | {"gbps": 1.9}),
        ]  # fmt: skip
        self.tokens = dict.fromkeys(("prefill-0", "prefill-1", "decode-0", "decode-1", "far"), 0)
        self.figures = Figures(0, 0, 0, 0, 0, 0, Counted(BOUNDS, [0] * 11, 0.0), Counted(BOUNDS, [0] * 11, 0.0))
        (folder / EVENTS).write_text("".join(map(past, _PAST)))
        self.exit("decode-1")

    def exit(self, name: str) -> None:
        """A process is killed."""
        report = ExitReport(
            **msgspec.structs.asdict(KILLED) | {"at": now_text()}, process=name, pid=1, epoch=f"7f3a-{time.time()}",
            lived_s=700.0, core_dumped=False, rusage=None, log="", kernel=(), last_lines=("INFO ready", "INFO step 1"),
        )  # fmt: skip
        self.journal.exit(report)
        ended = msgspec.structs.replace(KILLED, at=now_text())
        self.journal.say(name, ended.reason, "exited", **msgspec.structs.asdict(ended))

    def change(self, name: str, **changed: Any) -> None:
        self.processes = [
            msgspec.structs.replace(one, **changed) if one.name == name else one for one in self.processes
        ]

    def status(self) -> ServiceStatus:
        return ServiceStatus(**self._fields(), processes=tuple(self.processes))

    async def fresh_status(self) -> MeasuredStatus:
        measured = tuple(
            MeasuredProcess(
                **msgspec.structs.asdict(one), rss_bytes=3 * GB, cpu_percent=41.0, gpu_memory_bytes=127 * GB, running=9,
                waiting=0, kv_used=0.4, leases=2, tokens_per_s=300.0,
            )
            for one in self.processes
        )  # fmt: skip
        return MeasuredStatus(**self._fields(), processes=measured)

    def exits(self) -> tuple[ExitReport, ...]:
        return self.journal.exits()

    async def recent(self) -> tuple[RecentRequest, ...]:
        return tuple(request(number, failed=number == 58) for number in range(60, 0, -1))

    def ask(self, name: str, verb: Verb, drain: bool) -> str:
        self.asked.append((name, verb, "drain" if drain else ""))
        return "no process of that name" if name == "nobody" else ""

    def change_role(self, name: str, call: RoleOrder) -> str:
        self.asked.append((name, "role", call.role))
        return ""

    async def look(self) -> Look:
        return self.look_at(time.time())

    def look_at(self, now: float) -> Look:
        """A load that goes up and down."""
        wave = 1 + 0.4 * math.sin(now / 60) + random.Random(int(now / 5)).uniform(-0.08, 0.08)
        seconds, self.looked_at = now - self.looked_at if self.looked_at else 1.0, now
        for name in self.tokens:
            self.tokens[name] += int((1900 if "prefill" not in name else 12) * wave * seconds)
        ttft, itl = 0.09 * wave**2, 0.011 * (1 + wave / 4)
        old = self.figures
        self.figures = Figures(
            old.answered + 6 * wave * seconds, old.failed, 0, old.prompt_tokens + 5200 * wave * seconds, 1,
            int(max(0, wave - 1.1) * 20),
            counted(old.ttft, [ttft * 0.7, ttft, ttft, ttft * 2.2]), counted(old.itl, [itl * 0.8, itl, itl, itl * 1.9]),
        )  # fmt: skip
        states: dict[str, EngineState | str] = {
            name: state(name, self.tokens[name], wave) for name in self.tokens if self._answers(name)
        }
        leases = (
            lease(31, "prefill-0", "decode-0"),
            lease(32, "prefill-1", "decode-1", state="held", leak="its holder decode-1@7f3a-1 is gone", age_s=74.0),
        )
        return Look(states, KvStatus(engines=(), leases=leases, unreachable={}), {"proxy": self.figures})

    def _answers(self, name: str) -> bool:
        return all(one.state == "ready" for one in self.processes if one.name == name)

    def _fields(self) -> dict[str, Any]:
        is_ready = all(one.state == "ready" for one in self.processes)
        return {
            "service": "llama", "state": "ready" if is_ready else "degraded", "failure": None,
            "proxy_url": "http://127.0.0.1:8000", "model": "meta-llama/Llama-3.1-8B-Instruct",
            "served_model_name": "Llama-3.1-8B-Instruct", "tls_cert": "", "supervisor_pid": 1, "run_dir": "/run/pdctl",
            "log_dir": "/var/log/pdctl", "source": "", "trees": "cgroup", "apply": None,
            "attached": tuple(self.attached), "links": tuple(self.links),
        }  # fmt: skip


def counted(before: Counted, values: list[float]) -> Counted:
    counts = list(before.counts)
    for value in values:
        counts[sum(bound < value for bound in BOUNDS)] += 1
    return Counted(BOUNDS, counts, before.total + sum(values))


def state(name: str, tokens: int, wave: float) -> EngineState:
    used = int((0.3 + 0.1 * (sum(name.encode()) % 4)) * wave * 1000)
    return EngineState(
        name=name, role="", epoch=f"{name}-1", blocks_total=1600, blocks_free=1600 - min(1590, used), blocks_cached=100,
        blocks_referenced=used, blocks_leased=0, blocks_quarantined=0, blocks_reserved=0, held_back=0,
        running=int(12 * wave) if "prefill" not in name else int(2 * wave), waiting=int(max(0.0, wave - 1.2) * 9),
        tokens_total=tokens, leases=[], links=[], transfers={},
    )  # fmt: skip


def lease(number: int, engine: str, holder: str, **changed: Any) -> Lease:
    found = Lease(
        id=f"lease-{number}", request_id=f"5f0c2d1e9a7b4c6d8e{number:012x}", holder=f"{holder}@7f3a-1", state="claimed",
        age_s=0.4, quiet_s=0.1, blocks=86, bytes=91_000_000, leak="", engine=engine,
    )  # fmt: skip
    return msgspec.structs.replace(found, **changed)


class WithPast(Sampler):
    """Has samples of the last quarter of an hour from the start."""

    def __init__(self, look: Callable[[], Awaitable[Look]], viewers: Viewers) -> None:
        super().__init__(look, viewers)
        stage: Stage = look.__self__  # type: ignore[attr-defined]
        for back in range(900, 0, -1):
            values, _ = self._rates.of(time.monotonic() - back, stage.look_at(self.now() - back))
            self.history.add(self.now() - back, values)


async def serve(stage: Stage, gate: Gate, listener: socket.socket) -> None:
    """Serve the stage's page until cancelled."""
    with mock.patch.object(server, "read_gpus", return_value=GPUS), mock.patch.object(server, "Sampler", WithPast):
        await server.serve_page(stage, gate, listener)


@contextmanager
def staged() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory() as folder:
        yield Stage(Path(folder))


def main(port: int) -> None:
    gate = Gate(SECRET, "127.0.0.1")
    with staged() as stage:
        print(f"http://127.0.0.1:{port}/#{gate.token(write=True)}", flush=True)
        asyncio.run(serve(stage, gate, listen_tcp("127.0.0.1", port)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
