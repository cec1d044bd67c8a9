"""One supervised process: carries out what its lifecycle decides."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from pdctl.host.boot import new_epoch
from pdctl.lean_http import Pool, Unreachable
from pdctl.plan import ProcessSpec
from pdctl.supervisor.lifecycle import (
    Action,
    Do,
    Event,
    Exit,
    Kind,
    Life,
    Phase,
    Policy,
    advance,
    describe_exit,
    signal_name,
)
from pdctl.supervisor.tree import kill_tree, stamped
from pdctl.wire import EPOCH_ENV, LISTEN_FD_ENV, UNIT_ENV

_SHIM = Path(__file__).with_name("spawn_shim.py")
# Past this a killed process sits in the kernel; it is named and waited for, never doubled.
_KILL_DEADLINE_S = 10.0
_LOG_LIMIT = 64 * 2**20
# How long clearing up waits for the peers of a dead process to be told, seconds.
_TELL_S = 0.1


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a unit needs of its service. `changed` is called after every change of state, `died` the moment the
    process ends, before what it left is cleared away."""

    policy: Policy
    grace_s: float
    log_dir: Path
    env: dict[str, str]
    stamp_prefix: str
    tasks: asyncio.TaskGroup
    changed: Callable[[Unit], None]
    ready: Callable[[Unit], None]
    died: Callable[[Unit], asyncio.Task[None]]
    our_pids: Callable[[], set[int]]
    say: Callable[[str, str], None]


@dataclass(slots=True)
class Unit:
    """Feed it events; it spawns, probes, signals and reports."""

    spec: ProcessSpec
    around: Surroundings
    listen_fd: int | None = None
    life: Life = field(default_factory=Life)
    pid: int | None = None
    epoch: str = ""
    alive: bool = False
    ready_since: str | None = None
    last_exit: dict[str, object] | None = None
    stuck: list[int] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None
    _probe: asyncio.Task[None] | None = None
    _grace: asyncio.Task[None] | None = None

    @property
    def log_path(self) -> Path:
        """Where its output goes."""
        return self.around.log_dir / f"{self.spec.name}.log"

    @property
    def stamp(self) -> str:
        """What every process of its tree carries in the environment."""
        return f"{UNIT_ENV}={self.around.stamp_prefix}:{self.spec.name}"

    def feed(self, event: Event) -> None:
        """One event through the lifecycle, its actions begun."""
        before = self.life.phase
        self.life, actions = advance(self.life, event, self.around.policy)
        if self.life.phase is not before:
            self._phase_changed()
        for action in actions:
            self._do(action)
        self.around.changed(self)

    def status(self) -> dict[str, object]:
        """As `pdctl status --json` shows it."""
        return {
            "name": self.spec.name,
            "kind": self.spec.kind,
            "role": self.spec.role,
            "state": self.life.phase.value,
            "reason": self.life.reason,
            "pid": self.pid,
            "restarts": self.life.restarts,
            "last_exit": self.last_exit,
            "device": self.spec.device,
            "cpus": list(self.spec.cpus),
            "gpus": list(self.spec.gpus),
            "ports": self.spec.ports,
            "ready_since": self.ready_since,
            "rss_bytes": _resident(self.pid),
            "epoch": self.epoch,
            "log": str(self.log_path),
        }

    # -- actions -------------------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        tasks = self.around.tasks
        match action.do:
            case Do.SPAWN:
                self._spawn()
            case Do.TERMINATE:
                self._signal(signal.SIGTERM)
                self._grace = tasks.create_task(self._later(self.around.grace_s, Kind.GRACE_OVER))
            case Do.KILL_TREE:
                self.force()
            case Do.ARM_BACKOFF:
                tasks.create_task(self._later(action.seconds, Kind.START))

    def _spawn(self) -> None:
        assert self._process is None, f"{self.spec.name}: two lives at once"
        self.epoch = new_epoch()
        settings = json.dumps({"parent": os.getpid(), "cpus": list(self.spec.cpus)})
        argv = [self.spec.argv[0], "-I", "-S", str(_SHIM), settings, *self.spec.argv]
        env = {
            **os.environ,
            **self.spec.env,
            **self.around.env,
            EPOCH_ENV: self.epoch,
            "PYTHONUNBUFFERED": "1",
        }
        env[UNIT_ENV] = self.stamp.partition("=")[2]
        if self.listen_fd is not None:
            env[LISTEN_FD_ENV] = str(self.listen_fd)
        try:
            with _open_log(self.log_path) as log:
                process = subprocess.Popen(
                    argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    pass_fds=() if self.listen_fd is None else (self.listen_fd,),
                )  # fmt: skip
        except OSError as failure:
            self.feed(Event(Kind.CANNOT_SPAWN, detail=f"cannot be started: {failure}"))
            return
        self._process, self.pid, self.alive = process, process.pid, True
        self.around.say(self.spec.name, f"started, pid {process.pid}")
        self._watch(process)
        self._probe = self.around.tasks.create_task(self._probe_until_ready())

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Notice the exit the moment it happens, by pidfd."""
        pidfd = os.pidfd_open(process.pid)
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            code = process.wait()
            self.alive = False
            self.around.tasks.create_task(self._ended(code, self.around.died(self)))

        loop.add_reader(pidfd, ended)

    async def _ended(self, code: int, told: asyncio.Task[None]) -> None:
        """Report the exit once nothing of the tree is left: a replacement never meets its predecessor."""
        # Looking through /proc holds the loop for tens of milliseconds: peers hear of the death before that.
        await asyncio.wait({told}, timeout=_TELL_S)
        exit_ = Exit(None, -code) if code < 0 else Exit(code, None)
        self._cancel_timers()
        self._note_exit(exit_)
        while left := await kill_tree(self.stamp, self.around.our_pids(), _KILL_DEADLINE_S):
            self.stuck = left
            self.around.say(self.spec.name, f"pids {left} do not die; waiting for them before any restart")
        self.stuck = []
        self._process, self.pid = None, None
        self.feed(Event(Kind.EXITED, time.monotonic(), random.random(), exit_))  # noqa: S311 - jitter, no secret

    def _note_exit(self, exit_: Exit) -> None:
        self.ready_since = None
        expected = self.life.phase is Phase.STOPPING
        self.last_exit = {
            "at": _now(),
            "code": exit_.code,
            "signal": signal_name(exit_.signal) if exit_.signal is not None else None,
            "reason": "stopped by pdctl" if expected else describe_exit(exit_),
            "expected": expected,
        }
        self.around.say(self.spec.name, str(self.last_exit["reason"]))

    def force(self) -> None:
        """Kill the whole tree, now. One pass: `_ended` waits for the rest, and a later pass could meet a successor."""
        self._signal(signal.SIGKILL)
        for pid in stamped(self.stamp):
            _kill_quietly(pid, signal.SIGKILL)

    def _signal(self, sign: signal.Signals) -> None:
        if self._process is not None:
            _kill_quietly(self._process.pid, sign)

    async def _later(self, seconds: float, kind: Kind) -> None:
        await asyncio.sleep(seconds)
        self.feed(Event(kind, time.monotonic()))

    async def _probe_until_ready(self) -> None:
        probe = self.spec.probe
        address, _, path = probe.url.removeprefix("http://").partition("/")
        host, _, port = address.rpartition(":")
        pool = Pool(host.strip("[]"), int(port))
        deadline = time.monotonic() + probe.startup_s
        try:
            while time.monotonic() < deadline:
                try:
                    answer = await pool.request("GET", f"/{path}", timeout_s=probe.timeout_s)
                    if answer.status == 200:
                        self.feed(Event(Kind.PROBE_OK, time.monotonic()))
                        return
                except Unreachable:
                    pass  # not listening yet; its exit, if it comes to that, is noticed elsewhere
                await asyncio.sleep(probe.interval_s)
        finally:
            pool.close()
        self.feed(Event(Kind.STARTUP_TIMEOUT, time.monotonic()))

    def _phase_changed(self) -> None:
        phase = self.life.phase
        if phase is Phase.READY:
            self.ready_since = _now()
            self.around.say(self.spec.name, "ready")
            self.around.ready(self)
        elif phase is Phase.FAILED:
            self.around.say(self.spec.name, f"failed: {self.life.reason}")

    def _cancel_timers(self) -> None:
        for task in (self._probe, self._grace):
            if task is not None:
                task.cancel()
        self._probe = self._grace = None


def _open_log(path: Path) -> _LogFile:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > _LOG_LIMIT:
        path.replace(path.with_suffix(".log.1"))
    return _LogFile(path)


class _LogFile:
    """An append-only descriptor for a child; the file itself, so that nobody needs to pump it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _resident(pid: int | None) -> int | None:
    """Resident memory of a process and all below it."""
    if pid is None:
        return None
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(pid)
        for process in (leader, *leader.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total


def _kill_quietly(pid: int, sign: signal.Signals) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
