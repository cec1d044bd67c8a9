"""A real supervisor with scripted children: no engines and no proxy, but the same code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict, Unpack

import psutil

from pdctl.control_api import ControlClient, MeasuredProcess, MeasuredStatus, Verb
from pdctl.errors import NotRunning
from pdctl.plan import Plan, Probe, ProcessSpec
from pdctl.supervisor.rundir.journal import EVENTS, EXITS, read_entries
from pdctl.topology.spec import Proxy, Supervision
from tests.service import free_port

PATIENCE_S = 300.0
SUPERVISION = Supervision(
    grace_s=0.3, stop_signals=("SIGTERM",), drain_s=1.0, max_restarts=5, within_s=60.0, startup_s=20.0, stable_s=60.0,
    liveness_s=0.1, liveness_failures=3, progress_s=0.3, functional_s=0.0, on_supervisor_death="terminate", log_mb=64.0,
)  # fmt: skip
AT_ONCE = Probe("", "", "", "", interval_s=0.02, timeout_s=2.0, startup_s=20.0)


class Fields(TypedDict, total=False):
    """Of a ProcessSpec, where a test wants others."""

    kind: str
    role: str
    env: dict[str, str]
    device: str
    cpus: tuple[int, ...]
    gpus: tuple[str, ...]
    ports: dict[str, int]
    listen: tuple[str, int]
    restart_with: tuple[str, ...]
    probe: Probe
    slots: int


class Rules(TypedDict, total=False):
    """Of the supervision, where a test wants others."""

    grace_s: float
    max_restarts: int
    within_s: float
    stable_s: float
    progress_s: float
    functional_s: float
    on_supervisor_death: str
    log_mb: float


def child(name: str, *argv: str, **more: Unpack[Fields]) -> ProcessSpec:
    """A process that is not an engine."""
    spec = ProcessSpec(
        name=name, kind="builtin", role="other", argv=argv, env={}, device="cpu",
        cpus=tuple(sorted(os.sched_getaffinity(0))), gpus=(), ports={"http": free_port()}, depends_on=(), probe=AT_ONCE,
        listen=None, group=name,
    )  # fmt: skip
    return replace(spec, **more)


def shell(name: str, script: str, **more: Unpack[Fields]) -> ProcessSpec:
    """A child that is a shell script."""
    return child(name, "/bin/sh", "-c", script, **more)


def python(name: str, script: str, **more: Unpack[Fields]) -> ProcessSpec:
    """A child that is a Python program; `PORT` is its port."""
    spec = child(name, sys.executable, "-I", "-S", "-c", script, **more)
    return replace(spec, env={**spec.env, "PORT": str(spec.ports["http"])})


def plan_of(folder: Path, *processes: ProcessSpec, **rules: Unpack[Rules]) -> Plan:
    """A plan with only these processes."""
    proxy = Proxy("127.0.0.1", 1, "round_robin", (), 1, "queue", 8, 1.0, "warn", "", "", "", (), "", "")
    return Plan(
        service="fleet", model="none", model_path="none", model_ready=True, served_model_name="none", max_model_len=16,
        proxy=proxy, ttft_ms=1.0, tpot_ms=1.0, proxy_url="http://127.0.0.1:1", run_dir=str(folder / "run" / "fleet"),
        log_dir=str(folder / "logs"), supervision=replace(SUPERVISION, **rules),
        processes=processes, attached=(),
    )  # fmt: skip


@dataclass
class Fleet:
    """A running supervisor."""

    plan: Plan
    prefix: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        log = Path(self.plan.log_dir) / "supervisor.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "pdctl.supervisor"],
                stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(self.plan.to_dict()).encode())
        self.process.stdin.close()

    @property
    def control(self) -> ControlClient:
        return ControlClient(Path(self.plan.run_dir))

    def status(self) -> MeasuredStatus:
        return self.control.status()

    def of(self, name: str) -> MeasuredProcess:
        return next(process for process in self.status().processes if process.name == name)

    def ask(self, name: str, verb: Verb) -> None:
        self.control.act(name, verb)

    def until(self, name: str, reached: Callable[[MeasuredProcess], bool], what: str) -> MeasuredProcess:
        """Poll until a process has a state: the control API has no other way."""
        deadline = time.monotonic() + PATIENCE_S
        found: MeasuredProcess | None = None
        while time.monotonic() < deadline:
            with suppress(NotRunning):
                found = self.of(name)
                if reached(found):
                    return found
            time.sleep(0.01)
        raise AssertionError(f"{name} never was {what}: {found}\n{self.log()}")

    def ready(self, name: str) -> MeasuredProcess:
        return self.until(name, lambda now: now.state == "ready", "ready")

    def again(self, name: str, before: MeasuredProcess) -> MeasuredProcess:
        return self.until(name, lambda now: now.state == "ready" and now.epoch != before.epoch, "ready again")

    def apply(self, plan: Plan) -> None:
        """Start an apply."""
        self.control.apply(plan)

    def log(self) -> str:
        return (Path(self.plan.log_dir) / "supervisor.log").read_text()

    def output(self, name: str) -> str:
        return (Path(self.plan.log_dir) / f"{name}.log").read_text(errors="replace")

    def exits(self, name: str, count: int = 1) -> list[dict[str, object]]:
        """Wait for at least `count` exit reports: they are written shortly after the exit."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            entries = read_entries(Path(self.plan.log_dir), EXITS)
            found = [entry for entry in entries if entry["process"] == name]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"{len(found)} exits of {name}"
            time.sleep(0.01)

    def events(self) -> list[dict[str, object]]:
        return read_entries(Path(self.plan.log_dir), EVENTS)

    def stamped(self) -> list[psutil.Process]:
        """Every process with this fleet's stamp."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("PDCTL_UNIT", "").startswith(f"{self.plan.run_dir}:"):
                    found.append(process)
        return found

    def down(self) -> None:
        """Stop the supervisor and check that nothing is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_S)
        left = self.stamped()
        assert not left, f"left behind: {left}\n{self.log()}"


@contextmanager
def fleet(
    folder: Path, *processes: ProcessSpec, prefix: tuple[str, ...] = (), **rules: Unpack[Rules]
) -> Iterator[Fleet]:
    """A supervisor of these processes, always stopped afterwards."""
    before = os.environ.get("PDCTL_RUN")
    os.environ["PDCTL_RUN"] = str(folder / "run")
    found = Fleet(plan_of(folder, *processes, **rules), prefix)
    found.start()
    try:
        yield found
        found.down()
    finally:
        if found.process.poll() is None:
            found.process.kill()
            found.process.wait()
        for process in found.stamped():
            with suppress(psutil.Error):
                process.kill()
        if before is None:
            del os.environ["PDCTL_RUN"]
        else:
            os.environ["PDCTL_RUN"] = before
