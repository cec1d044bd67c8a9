"""`pdctl bench chaos`: put load on the running service while its processes are killed and frozen."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.bench.load import endpoint_of, vocabulary
from pdctl.commands.bench.watch import Leaks
from pdctl.commands.common import FileOption, JsonOption, ServiceOption, control, find_service
from pdctl.errors import NotAnswering, NotRunning, PdctlError, Verdict
from pdctl.host import program

if TYPE_CHECKING:
    from pdctl.bench import Asked
    from pdctl.bench.chaos import Difference, Observations
    from pdctl.bench.client import Endpoint
    from pdctl.control_api import ProcessStatus, RoleName, ServiceStatus

_FAULTS = ("kill", "freeze", "restart", "role")
_ROLES: tuple[RoleName, ...] = ("prefill", "decode", "hybrid")
_LOOK_S = 0.1
_ANSWER_S = 600.0
# The leases of the last requests may outlive them by this long, seconds.
_LEASES_S = 5.0
# The supervisor is no process of the topology, but it can be killed too.
SUPERVISOR = "supervisor"


def chaos(
    seconds: float = typer.Option(60.0, "--for", min=1.0, help="Duration in seconds."),
    every: float = typer.Option(20.0, "--every", min=0.5, help="Seconds between faults."),
    faults: list[str] = typer.Option(
        ["kill:prefill", "kill:decode"],
        "--fault",
        help="Fault: kill:TARGET, freeze:TARGET, restart:TARGET (drained) or role:TARGET (another role, at random); a "
        "target is an engine group, proxy or supervisor. Repeatable.",
    ),
    frozen: float = typer.Option(3.0, "--frozen", min=0.1, help="Seconds that a frozen process stays frozen."),
    streams: int = typer.Option(
        8, "--streams", min=1, help="Concurrent clients; each sends its next request when the last one is answered."
    ),
    prompts: int = typer.Option(16, "--prompts", min=1, help="Number of different requests."),
    inputs: str = typer.Option("100", "--input", help="Prompt length in tokens."),
    outputs: str = typer.Option("48", "--output", help="Answer length in tokens."),
    back_within: float = typer.Option(
        120.0, "--back-within", min=1.0, help="Seconds within which a process must be ready again."
    ),
    seed: int = typer.Option(0, "--seed", help="Random seed: same seed, same requests and faults."),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    as_json: bool = JsonOption,
) -> None:
    """Kill and freeze the running service's processes under load, and check its promises: no failed request, no wrong
    answer, no leaked lease. Exit code 1: a promise was broken. Do not use it on a service in production."""
    from pdctl.adapters import dialect
    from pdctl.bench.chaos import Observations
    from pdctl.bench.workload import lengths, synthetic

    name = find_service(service, file)
    status = control(name).status(measurements=False)
    names = [*(process.name for process in status.processes if is_here(status, process)), SUPERVISOR]
    far = [process.name for process in status.processes if not is_here(status, process)]
    rng = random.Random(seed)  # noqa: S311 - a workload, not a secret
    _check(faults, names, far, rng, Path(status.run_dir))
    if seconds <= every:
        raise PdctlError(f"--for {seconds:g} ends before the first fault", f"give more than --every {every:g}")
    endpoint = endpoint_of(status.proxy_url, "", "", ignore_eos=True, timeout=_ANSWER_S)
    into, out = lengths(inputs, "--input"), lengths(outputs, "--output")
    asked = synthetic(prompts, into, out, vocabulary(endpoint), rng)
    texts, gaps = _in_quiet(endpoint, asked, streams)
    if unsteady := texts.count(None):
        mark = console.paint("warning:", "yellow", sys.stderr)
        console.note(f"{mark} {unsteady} of {prompts} greedy requests gave different answers before any fault was "
                     "injected; their answers are not compared")  # fmt: skip
    observed, leaked = Observations(quiet_gaps=gaps), Leaks()
    engine_kinds = {process.kind for process in status.processes if process.is_engine}
    if all(dialect(kind).deterministic for kind in engine_kinds):
        observed.unsteady = unsteady
    schedule = _Schedule(name, faults, seconds, every, frozen, back_within, rng, status.source)
    try:
        asyncio.run(_under_load(endpoint, asked, texts, streams, observed, schedule, leaked))
    except KeyboardInterrupt:
        console.note(f"{console.paint('warning:', 'yellow', sys.stderr)} interrupted; these are the results so far")
    leaks = _leaks(name)
    tokens = _differences(endpoint, observed)
    if as_json:
        console.out(json.dumps(_measurements(observed, tokens, leaked, leaks), indent=2))
    else:
        _tell(observed, tokens, leaked, leaks)
    raise Verdict(1 if observed.broken or leaks else 0)


def _in_quiet(endpoint: Endpoint, asked: list[Asked], streams: int) -> tuple[list[str | None], list[float]]:
    """The answer to each request before any fault (None: answers differed), and the gaps between tokens. Raises
    PdctlError."""
    from pdctl.bench.chaos import expected

    console.note(f"sending {len(asked)} requests without faults, {streams} at once ...")
    try:
        return asyncio.run(expected(endpoint, asked, streams))
    except ValueError as failure:
        raise PdctlError(f"failed before any fault was injected: {failure}", "see: pdctl status, pdctl logs") from None


async def _under_load(
    endpoint: Endpoint,
    asked: list[Asked],
    texts: list[str | None],
    streams: int,
    observed: Observations,
    schedule: _Schedule,
    leaked: Leaks,
) -> None:
    """Run load, faults and the leak watch. However it ends, no fault follows: threads do not end with their task."""
    from pdctl.bench.chaos import load

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(endpoint, asked, texts, streams, observed, lambda: schedule.is_over))
            tasks.create_task(asyncio.to_thread(schedule.carry_out, observed))
            tasks.create_task(asyncio.to_thread(leaked.watch, schedule.service, schedule.wait))
    finally:
        schedule.stop()


def is_here(status: ServiceStatus, process: ProcessStatus) -> bool:
    """Whether a process runs on this machine, where signals reach it."""
    return not status.nodes or any(node.asked and node.name == process.node for node in status.nodes)


def _check(faults: list[str], names: list[str], far: list[str], rng: random.Random, run_dir: Path) -> None:
    from pdctl.bench.chaos import group_of, pick
    from pdctl.supervisor.rundir.adoption import read_adoptable

    for word in faults:
        what = word.partition(":")[0]
        if what not in _FAULTS or pick(names, [word], rng, far) is None:
            hint = f"such as kill:decode; groups: {', '.join(sorted(set(map(group_of, names))))}"
            hint += "; signals reach the processes of this machine only" if far else ""
            raise PdctlError(f"--fault {word!r} does not match this service", hint)
        if word.endswith(f":{SUPERVISOR}") and far:
            raise PdctlError(f"--fault {word!r}: pdctl cannot start a node's agent again", "choose another fault")
        if word.endswith(f":{SUPERVISOR}") and (what != "kill" or read_adoptable(run_dir) is None):
            hint = 'only kill:supervisor works, and only with on_supervisor_death = "survive" under [supervisor]'
            raise PdctlError(f"--fault {word!r}: this service stops with its supervisor", hint)


class _Schedule:
    """Injects one fault after another, each after the service has recovered. Runs in its own thread."""

    def __init__(
        self, service: str, faults: list[str], seconds: float, every: float, frozen: float, back_s: float,
        rng: random.Random, source: str,
    ) -> None:  # fmt: skip
        self._over = threading.Event()
        self._source = source
        self.service, self._faults, self._rng = service, faults, rng
        self._every, self._frozen, self._back_s = every, frozen, back_s
        self._end = time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        """Whether the load can stop."""
        return self._over.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait that many seconds, or until the schedule is over. Returns whether it is over."""
        return self._over.wait(seconds)

    def stop(self) -> None:
        """Inject no further fault."""
        self._over.set()

    def carry_out(self, observed: Observations) -> None:
        """Inject faults until the time is over, and wait for the last recovery."""
        try:
            next_at = time.monotonic() + self._every
            while next_at < self._end and not self.wait(max(0.0, next_at - time.monotonic())):
                self._one(observed)
                # Jitter, so that faults do not coincide with anything periodic.
                next_at = max(next_at + self._every * self._rng.uniform(0.9, 1.1), time.monotonic())
            self.wait(max(0.0, self._end - time.monotonic()))
        finally:
            self._over.set()

    def _one(self, observed: Observations) -> None:
        from pdctl.bench.chaos import ORDERS, Fault, carry_out, pick

        if (status := self._status()) is None:
            return
        # A process that the supervisor has given up has no pid, and cannot be broken again.
        alive = [process for process in status.processes if process.pid]
        pids_of = {process.name: process.pid for process in alive if process.pid and is_here(status, process)}
        far = sorted(process.name for process in alive if process.name not in pids_of)
        chosen = pick([*sorted(pids_of), *([SUPERVISOR] if pids_of else [])], self._faults, self._rng, far)
        if chosen is None:
            return
        what, name = chosen
        pids = (status.supervisor_pid,) if name == SUPERVISOR else _tree(pids_of[name]) if name in pids_of else ()
        fault = Fault(what, name, pids)
        if what in ORDERS and not self._order(what, name):
            return
        began = time.monotonic()
        observed.faults.append(fault)
        observed.fault_times.append(began)
        console.note(f"{what} {name}; so far {observed.answered} answered, {sum(observed.failed.values())} failed, "
                     f"{observed.wrong} wrong")  # fmt: skip
        if what not in ORDERS:
            carry_out(fault, self._frozen, self.wait)
        if name == SUPERVISOR:
            seconds = self._taken_over(began)
        else:
            old_pid = next((one.pid for one in alive if one.name == name), None)
            seconds = self._ready_again(name, old_pid if what in ("kill", "restart") else None, began)
        # If the wait was cut short by a stop, it is unknown whether the process would have recovered.
        if seconds is not None or not self._over.is_set():
            observed.recovered.append(seconds)

    def _order(self, what: str, name: str) -> bool:
        """Have an engine restarted, or given another role. False if that is refused, such as a role without which the
        service cannot do."""
        try:
            if what == "restart":
                control(self.service).act(name, "restart", drain=True)
            else:
                control(self.service).change_role(name, self._rng.choice(_ROLES), self._rng.choice([0.0, 2.0]))
        except PdctlError:
            return False
        return True

    def _taken_over(self, began: float) -> float | None:
        """Start pdctl again, as its user or systemd would. Returns the seconds since the fault, None on failure."""
        words = ["up", "-d", *(["-f", self._source] if Path(self._source).is_file() else [])]
        try:
            # In its own session: Ctrl-C must not leave the service without a supervisor.
            done = subprocess.run(
                program.pdctl(*words), capture_output=True, timeout=self._back_s, check=False,
                start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
        return time.monotonic() - began if done.returncode == 0 else None

    def _ready_again(self, name: str, old_pid: int | None, began: float) -> float | None:
        while time.monotonic() - began < self._back_s and not self.is_over:
            status = self._status()
            now = status.process(name) if status is not None else None
            if now is not None and now.state == "ready" and now.pid != old_pid and not now.leaving_role:
                return time.monotonic() - began
            self.wait(_LOOK_S)
        return None

    def _status(self) -> ServiceStatus | None:
        """The service's status; without processes if no supervisor answers."""
        try:
            return control(self.service).status(measurements=False)
        except (NotRunning, NotAnswering):
            return None


def _tree(pid: int) -> tuple[int, ...]:
    import psutil

    try:
        leader = psutil.Process(pid)
        return (pid, *(child.pid for child in leader.children(recursive=True)))
    except psutil.NoSuchProcess:
        return (pid,)


def _leaks(service: str) -> list[str]:
    """Leases that remain shortly after the last request, or why that is unknown."""
    deadline = time.monotonic() + _LEASES_S
    while True:
        try:
            found = control(service).leases()
        except PdctlError as failure:
            return [f"unknown: {failure.message}"]
        left = [f"{lease.engine}: {lease.id}, {lease.blocks} blocks" for lease in found.leases]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_LOOK_S)


def _differences(endpoint: Endpoint, observed: Observations) -> Difference:
    """Differences in tokens of the service, or in words if the service does not tokenize or no longer answers."""
    from pdctl.bench.chaos import Difference, difference
    from pdctl.bench.client import tokenized

    asks = True

    def cut(text: str) -> list[int]:
        nonlocal asks
        try:
            return asyncio.run(tokenized(endpoint, text)) if asks and text else []
        except PdctlError:
            asks = False
            return []

    found = Difference()
    for pair in observed.differing:
        ids = [cut(text) for text in pair]
        # Cut both texts the same way: otherwise the counts mean nothing.
        whole = all(cut_ or not text for cut_, text in zip(ids, pair, strict=True))
        found += difference(*ids) if whole else difference(*(text.split() for text in pair))
    return found


def _by_fault(observed: Observations) -> dict[str, list[float | None]]:
    """Seconds to recover, by fault and group."""
    from pdctl.bench.chaos import group_of

    found: dict[str, list[float | None]] = {}
    for fault, seconds in zip(observed.faults, observed.recovered, strict=False):
        found.setdefault(f"{fault.what} {group_of(fault.name)}", []).append(seconds)
    return found


def _measurements(observed: Observations, tokens: Difference, leaked: Leaks, leaks: list[str]) -> dict[str, object]:
    """The results as `--json` prints them. Times are in seconds."""
    from pdctl.bench.measurements import percentile

    back = [seconds for seconds in observed.recovered if seconds is not None]
    return {
        "faults": len(observed.faults),
        "answered": observed.answered,
        "failed": observed.failed,
        "truncated": observed.truncated,
        "unsteady": observed.unsteady,
        "compared": observed.compared,
        "wrong": observed.wrong,
        "tokens": {"lost": tokens.lost, "repeated": tokens.repeated, "other": tokens.other},
        "leases_left": leaks,
        "leaked_block_s": leaked.block_seconds,
        "leaked_most_blocks": leaked.most_blocks,
        "leak_looks": leaked.looks,
        "by_fault": {name: {"faults": len(all_), "ready_again_s": all_} for name, all_ in _by_fault(observed).items()},
        "pause_s": {f"p{part}": percentile(observed.pauses, part) for part in (50, 99, 100)},
        "quiet_gap_s": {f"p{part}": percentile(observed.quiet_gaps, part) for part in (50, 99, 100)},
        "ready_again_s": {f"p{part}": percentile(back, part) for part in (50, 100)},
        "broken": _broken(observed, leaks),
    }


def _broken(observed: Observations, leaks: list[str]) -> list[str]:
    return [*observed.broken, *([f"{len(leaks)} leases were not released"] if leaks else [])]


def _tell(observed: Observations, tokens: Difference, leaked: Leaks, leaks: list[str]) -> None:
    """Print the results as text."""
    failed = sum(observed.failed.values())
    console.out(
        f"{len(observed.faults)} faults: {observed.answered} answered, {failed} failed, "
        f"{observed.truncated} truncated, {observed.wrong} wrong, {len(leaks)} leases not released"
    )
    changed = f"{tokens.lost} lost, {tokens.repeated} repeated, {tokens.other} different"
    console.out(f"tokens: {changed}, in {observed.compared} compared answers")
    console.out(f"leaked KV: {leaked.block_seconds:.1f} block-seconds, at most {leaked.most_blocks} blocks, in "
                f"{leaked.looks} samples")  # fmt: skip
    console.out(console.table(["", "P50", "P99", "WORST"], [
        _row("gap between tokens, without faults", observed.quiet_gaps),
        _row("longest pause of a stream during a fault", observed.pauses),
        *(
            _row(f"time to ready after {name} ({len(all_)} times)", [s for s in all_ if s is not None])
            for name, all_ in sorted(_by_fault(observed).items())
        ),
    ]))  # fmt: skip
    for reason, count in sorted(observed.failed.items(), key=lambda entry: -entry[1])[:5]:
        console.note(f"failed {count} times: {reason}")
    for promise in _broken(observed, leaks):
        console.note(f"BROKEN: {promise}")


def _row(title: str, seconds: list[float]) -> list[str]:
    from pdctl.bench.measurements import percentile

    return [title, *(f"{percentile(seconds, part):.2f} s" if seconds else "-" for part in (50, 99, 100))]
