"""One supervised process: executes what its lifecycle decides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pdctl.control_api import LastExit
from pdctl.host.boot import new_epoch
from pdctl.net.identity import ContextFactory
from pdctl.net.keeping import LEAVE_SIGNAL
from pdctl.plan import ProcessSpec
from pdctl.supervisor.process import logs
from pdctl.supervisor.process.keeper import Keeper
from pdctl.supervisor.process.shared_memory import remove_unused
from pdctl.supervisor.process.spawn import Start, spawn, write_files
from pdctl.supervisor.process.startup import NO_WORDS, LastWords, last_words
from pdctl.supervisor.process.tree import Tree, Trees, kill_quietly
from pdctl.supervisor.rundir.adoption import Record, from_shell, recorded_exit, recorded_pid
from pdctl.supervisor.rundir.journal import Journal, now_text
from pdctl.supervisor.unit.clearing import Baseline, Remains, baseline_of, clear, in_the_way
from pdctl.supervisor.unit.exits import Ended, KernelLog, report, told_of
from pdctl.supervisor.unit.lifecycle import (
    ENDED,
    LIVE,
    Action,
    Do,
    Exit,
    Goal,
    Kind,
    Life,
    LifecycleEvent,
    Phase,
    advance,
)
from pdctl.supervisor.unit.policy import ProcessPolicy
from pdctl.supervisor.unit.watch import Watch, launcher_of

# How long clearing up waits until the peers of a dead process are informed, seconds.
_TELL_S = 0.1
_REPORT_AFTER_S = 0.05


@dataclass(frozen=True, slots=True)
class UnitContext:
    """What a unit needs of its service. `changed` is called after every change of state, `died` the moment the
    process ends, before what it left is cleared away; `drain` returns when nothing runs in it any more. `node`: of a
    cluster; `tls`: for calls of processes that want certificates."""

    policy: ProcessPolicy
    log_dir: Path
    run_dir: Path
    env: dict[str, str]
    secret: str
    trees: Trees
    tasks: asyncio.TaskGroup
    journal: Journal
    kernel: KernelLog
    changed: Callable[[Unit], None]
    ready: Callable[[Unit], None]
    died: Callable[[Unit], asyncio.Task[None]]
    drain: Callable[[Unit], Coroutine[None, None, None]]
    our_pids: Callable[[], set[int]]
    node: str = ""
    tls: ContextFactory | None = None


@dataclass(slots=True)
class Unit:
    """Takes events; spawns, probes, signals and reports the process.

    `leaving_role`: the role whose last work it does after a change. `blocked`: what delays the next start; `reports`:
    exit reports still being written; `keeper`: of a proxy whose connections outlive it; `is_replaced`: another process
    will go on with these; `exit_file`: where the exit code of a process that may outlive the supervisor is
    written.
    """

    spec: ProcessSpec
    around: UnitContext
    stamp: str
    listen_fd: int | None = None
    keeper: Keeper | None = None
    is_replaced: bool = False
    life: Life = field(default_factory=Life)
    pid: int | None = None
    epoch: str = ""
    alive: bool = False
    adopted: bool = False
    leaving_role: str = ""
    ready_since: str | None = None
    started_at: float = 0.0
    last_exit: LastExit | None = None
    blocked: str = ""
    reports: int = 0
    tree: Tree | None = None
    baseline: Baseline = field(default_factory=dict)
    exit_file: Path | None = None
    _leader: int | None = None
    _log_inode: int = 0
    _by_us: str = ""
    _words: LastWords = NO_WORDS
    watch: Watch | None = None
    _moved: asyncio.Event = field(default_factory=asyncio.Event)
    _timers: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The process's name in the plan."""
        return self.spec.name

    @property
    def log_path(self) -> Path:
        """The file of its output."""
        return self.around.log_dir / f"{self.name}.log"

    @property
    def leader(self) -> int | None:
        """The pid of the command itself. If it may outlive the supervisor, `pid` is the shell that waits for it."""
        if self.exit_file is not None and self._leader is None:
            self._leader = recorded_pid(self.exit_file)
        return self._leader or self.pid

    def feed(self, event: LifecycleEvent) -> None:
        """Pass one event through the lifecycle and start the resulting actions."""
        before = self.life.phase
        self.life, actions = advance(self.life, event, self.around.policy.restarts)
        if self.life.phase is not before:
            self._phase_changed(before)
        for action in actions:
            self._do(action)
        self.around.changed(self)

    async def until(self, phases: frozenset[Phase]) -> None:
        """Return when the process is in one of these phases."""
        while self.life.phase not in phases:
            self._moved.clear()
            await self._moved.wait()

    # -- actions -------------------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        policy = self.around.policy
        match action.do:
            case Do.SPAWN:
                self._spawn()
            case Do.DRAIN:
                self._arm("drain", self._drain())
            case Do.SIGNAL:
                sign = LEAVE_SIGNAL if self._hands_over else policy.stop_signals[action.number]
                self._by_us = f"pdctl, with {sign.name}"
                self._signal(sign)
                self._arm("grace", self._later(policy.grace_s, Kind.GRACE_OVER))
            case Do.KILL_TREE:
                self.force()
            case Do.CLEAR:
                pass  # started where the exit was detected: that code first waits for the peers
            case Do.ARM_BACKOFF:
                if action.seconds:
                    self._arm("backoff", self._later(action.seconds, Kind.START))
                else:
                    self.feed(LifecycleEvent(Kind.START, time.monotonic()))
            case Do.ARM_STABLE:
                self._arm("stable", self._later(policy.stable_s, Kind.STABLE))

    def _spawn(self) -> None:
        assert not self.alive, f"{self.name}: two incarnations at once"
        self.epoch, self._by_us, self.blocked = new_epoch(node=self.around.node), "", ""
        if reason := in_the_way(self.spec, {}, self.around.our_pids()):
            self.feed(LifecycleEvent(Kind.CANNOT_SPAWN, detail=f"cannot be started: {reason}"))
            return
        self.baseline = self.baseline or baseline_of(self.spec)
        self.tree = self.around.trees.of(self.name)
        exits = self.around.run_dir / "exits"
        self.exit_file = exits / f"{self.name}.{self.epoch}" if self.around.policy.survives else None
        try:
            if self.exit_file is not None:
                exits.mkdir(exist_ok=True)
            write_files(self.spec)
            pid = self._start()
        except OSError as failure:
            if self.keeper is not None:
                self.keeper.ended()
            self.feed(LifecycleEvent(Kind.CANNOT_SPAWN, detail=f"cannot be started: {failure}"))
            return
        self._is_alive(pid, time.monotonic())
        self.around.journal.say(
            self.name, f"started, pid {self.pid}", "started", pid=self.pid, epoch=self.epoch, start=self.life.starts
        )

    def _start(self) -> int:
        """Start the process. Returns its pid. Raises OSError."""
        assert self.tree is not None
        with contextlib.ExitStack() as stack:
            takeover = None
            if self.keeper is not None:
                channel, journal = self.keeper.hand_over()
                stack.enter_context(channel)
                takeover = (channel.fileno(), journal)
            start = Start(
                self.spec, self.around.env, self.stamp, self.epoch, self.listen_fd, self.tree.join, self.exit_file,
                takeover,
            )  # fmt: skip
            log = self._open_log()
            stack.callback(os.close, log)
            return spawn(start, log)

    @property
    def _hands_over(self) -> bool:
        """Whether another process goes on with its connections after a stop."""
        return self.keeper is not None and (self.life.goal is Goal.AGAIN or self.is_replaced)

    def _open_log(self) -> int:
        """Open the log. If the disk accepts no new file, the output is lost; the process still starts."""
        try:
            log = logs.open_new(self.log_path)
        except OSError as failure:
            self.around.journal.say(self.name, f"the log cannot be opened, output is lost: {failure}", "no_log")
            log = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._log_inode = os.fstat(log).st_ino
        return log

    def adopt(self, record: Record) -> None:
        """Adopt a running process that an earlier supervisor started."""
        self.life = Life(Phase.STARTING, record.starts)
        self.spec = record.spec
        self.epoch, self.adopted, self.last_exit = record.epoch, True, record.last_exit
        self.exit_file = Path(record.record) if record.record else None
        self.tree = self.around.trees.adopted(self.name, record.group)
        self.ready_since = record.ready_since
        self._is_alive(record.pid, record.started_at)
        self.around.journal.say(self.name, f"adopted, pid {record.pid}", "adopted", pid=record.pid, epoch=self.epoch)
        self.around.changed(self)

    def _is_alive(self, pid: int, at: float) -> None:
        self.pid, self.alive, self.started_at, self._leader = pid, True, at, None
        self._notice_exit(pid)
        assert self.tree is not None
        self.tree.session = pid
        around = self.around
        self.watch = Watch(self.spec, self.log_path, around.secret, around.journal, self.tree, self.feed, around.tls)
        self._arm("probe", self.watch.run(lambda: self.around.policy.cadence))

    def _notice_exit(self, pid: int) -> None:
        """Detect the exit immediately, by pidfd."""
        loop = asyncio.get_running_loop()
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            # An adopted process that just ended. An own child remains as a zombie until it is waited for.
            loop.call_soon(self._ended, pid)
            return

        def ended() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._ended(pid)

        loop.add_reader(pidfd, ended)

    def _ended(self, pid: int) -> None:
        ended = self._how(pid)
        self.alive = False
        self.last_exit = told_of(ended)
        self.around.journal.say(self.name, self.last_exit.reason, "exited", **msgspec.structs.asdict(self.last_exit))
        told = self.around.died(self)
        self.around.tasks.create_task(self._clear_up(ended, told))

    def _how(self, pid: int) -> Ended:
        """How it ended: from the kernel for an own child, else from the record that its shell wrote."""
        status, usage = None, None
        with contextlib.suppress(ChildProcessError):
            _, status, usage = os.wait4(pid, 0)
        code = None if status is None else os.waitstatus_to_exitcode(status)
        if self.exit_file is not None:
            code = recorded_exit(self.exit_file) if code is None else (code if code < 0 else from_shell(code))
        exit_ = Exit(None, None) if code is None else Exit(None, -code) if code < 0 else Exit(code, None)
        expected = self.life.phase is Phase.STOPPING
        dumped = status is not None and os.WIFSIGNALED(status) and os.WCOREDUMP(status)
        leader = self.leader or pid
        self._words = last_words(self.log_path, launcher_of(self.spec).failures) if exit_.code else NO_WORDS
        words = ". ".join(filter(None, (self._words.text, self._words.hint)))
        return Ended(
            self.name, leader, self.epoch, self.started_at, exit_, usage, self._by_us, expected, dumped, words,
            uses_gpus=bool(self.spec.gpus),
        )  # fmt: skip

    async def _clear_up(self, ended: Ended, told: asyncio.Task[None]) -> None:
        """Report the exit, and clear what is left before a replacement starts."""
        self._cancel_timers()
        if self.exit_file is not None:
            self.exit_file.with_name(f"{self.exit_file.name}.pid").unlink(missing_ok=True)
            self.exit_file.unlink(missing_ok=True)
        exited = LifecycleEvent(
            Kind.EXITED, time.monotonic(), exit=ended.exit, detail=ended.words, incurable=self._words.incurable
        )
        self.feed(exited)
        assert self.tree is not None
        # Clearing up may block the event loop for milliseconds: inform peers of the exit first.
        await asyncio.wait({told}, timeout=_TELL_S)
        if self.keeper is not None:
            await self.keeper.told_all()
            self.keeper.ended(ended.of_itself)
        remains = Remains(self.spec, self.tree, self.baseline, self.around.our_pids)
        await clear(remains, self._is_blocked)
        assert self.watch is not None
        if removed := remove_unused(self.watch.shared_memory):
            message = f"removed shared memory that it left: {', '.join(removed)}"
            self.around.journal.say(self.name, message, "shared_memory")
        self.pid = self._leader = None
        group = self.tree.join.parent if self.tree.join is not None else None
        inode = self._log_inode
        self.feed(LifecycleEvent(Kind.CLEARED, time.monotonic(), random.random()))  # noqa: S311 - jitter, no secret
        self.reports += 1
        try:
            # Work that others wait for goes first.
            await asyncio.sleep(_REPORT_AFTER_S)
            self._note_exit(ended, group, inode)
        finally:
            self.reports -= 1
            self.around.changed(self)

    def _is_blocked(self, reason: str) -> None:
        self.blocked = reason
        if reason:
            self.around.journal.say(self.name, f"restart delayed: {reason}", "blocked")
        self.around.changed(self)

    def _note_exit(self, ended: Ended, group: Path | None, inode: int) -> None:
        """Report the exit after the replacement has started, because reading logs takes longer than a start.

        The inode finds the log: by then the replacement's log has its name.
        """
        log = logs.by_inode(self.log_path, inode)
        found = report(ended, log, group, self.around.kernel)
        if self.last_exit is not None and found.reason != self.last_exit.reason:
            told = msgspec.structs.replace(self.last_exit, reason=found.reason, by=found.by, oom=found.oom)
            self.last_exit = told
            self.around.changed(self)
        self.around.journal.exit(found)

    def force(self) -> None:
        """Kill the whole tree now, in one pass; clearing up waits for the rest."""
        if self.alive:
            self._by_us = f"pdctl, with SIGKILL ({self.life.reason or self.life.phase.value})"
            if self.pid is not None and self.exit_file is None:
                kill_quietly(self.pid, signal.SIGKILL)
            assert self.tree is not None
            self.tree.kill()

    def _signal(self, sign: signal.Signals) -> None:
        if self.alive and self.leader is not None:
            kill_quietly(self.leader, sign)

    # -- timers --------------------------------------------------------------------------------------------

    def _arm(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Start a task, at most one per name; all end with the incarnation."""
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = self.around.tasks.create_task(work)

    async def _later(self, seconds: float, kind: Kind) -> None:
        await asyncio.sleep(seconds)
        self.feed(LifecycleEvent(kind, time.monotonic()))

    async def _drain(self) -> None:
        await self.around.drain(self)
        self.feed(LifecycleEvent(Kind.DRAINED))

    def _phase_changed(self, before: Phase) -> None:
        phase, journal = self.life.phase, self.around.journal
        self._moved.set()
        if phase is Phase.READY and before is Phase.STARTING:
            # An adopted process was ready before this supervisor started.
            self.ready_since = self.ready_since or now_text()
            journal.say(self.name, "ready", "ready", after_s=round(time.monotonic() - self.started_at, 3))
            self.around.ready(self)
        elif phase is Phase.FAILED:
            journal.say(self.name, f"failed: {self.life.reason}", "failed")
        elif phase in (Phase.DRAINING, Phase.DRAINED, Phase.STOPPED):
            journal.say(self.name, phase.value, phase.value)
        if phase not in LIVE:
            self.ready_since = None
        if phase in ENDED and self.keeper is not None and not self.is_replaced:
            self.keeper.drop_all()
        if phase is not Phase.BACKOFF and (timer := self._timers.pop("backoff", None)):
            timer.cancel()
        if before is Phase.DRAINING and (timer := self._timers.pop("drain", None)) and phase is not Phase.DRAINED:
            timer.cancel()

    def _cancel_timers(self) -> None:
        for task in self._timers.values():
            task.cancel()
        self._timers.clear()
