"""`pdctl bench chaos`: load on the running service while its processes are killed and frozen."""

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
from pdctl.commands.common import STATE, FileOption, JsonOption, ServiceOption, Status, call, find_service
from pdctl.errors import NotAnswering, NotRunning, PdctlError, Verdict

if TYPE_CHECKING:
    from pdctl.bench import Asked
    from pdctl.bench.chaos import Difference, Seen
    from pdctl.bench.client import Endpoint

_FAULTS = ("kill", "freeze")
_LOOK_S = 0.1
_ANSWER_S = 600.0
# Leases of the last requests end with them, give or take a message.
_LEASES_S = 5.0
# Not a process of the topology: the one that looks after them.
SUPERVISOR = "supervisor"


def chaos(
    seconds: float = typer.Option(60.0, "--for", min=1.0, help="How long, seconds."),
    every: float = typer.Option(20.0, "--every", min=0.5, help="Seconds between faults."),
    faults: list[str] = typer.Option(
        ["kill:prefill", "kill:decode"], "--fault", help="kill: or freeze: and a GROUP, proxy or supervisor; several."
    ),
    frozen: float = typer.Option(3.0, "--frozen", min=0.1, help="Seconds that a frozen process stands still."),
    streams: int = typer.Option(8, "--streams", min=1, help="Clients, each asking again when it is answered."),
    prompts: int = typer.Option(16, "--prompts", min=1, help="Different requests."),
    inputs: str = typer.Option("100", "--input", help="Tokens of a prompt."),
    outputs: str = typer.Option("48", "--output", help="Tokens of an answer."),
    back_within: float = typer.Option(120.0, "--back-within", min=1.0, help="Seconds a process has to be ready again."),
    seed: int = typer.Option(0, "--seed", help="The same seed asks and breaks the same."),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    as_json: bool = JsonOption,
) -> None:
    """Break the running service's processes under load, and check its promises: nothing failed, nothing wrong, nothing
    leaked. Exit code 1 if one of them was not kept. Only for a service whose clients may notice."""
    from pdctl.bench.chaos import Seen
    from pdctl.bench.workload import lengths, synthetic

    name = find_service(service, file)
    status = call(name, "GET", STATE)
    names = [*(process["name"] for process in status["processes"]), SUPERVISOR]
    rng = random.Random(seed)  # noqa: S311 - a workload, not a secret
    _check(faults, names, rng, Path(status["run_dir"]))
    if seconds <= every:
        raise PdctlError(f"--for {seconds:g} ends before the first fault", f"more than --every {every:g}")
    endpoint = endpoint_of(str(status["proxy_url"]), "", "", ignore_eos=True, timeout=_ANSWER_S)
    into, out = lengths(inputs, "--input"), lengths(outputs, "--output")
    asked = synthetic(prompts, into, out, vocabulary(endpoint), rng)
    texts, gaps = _in_quiet(endpoint, asked, streams)
    if unsteady := texts.count(None):
        mark = console.paint("warning:", "yellow", sys.stderr)
        console.note(f"{mark} {unsteady} of {prompts} greedy requests are answered now so, now so, in quiet already; "
                     "their answers are not compared")  # fmt: skip
    seen, leaked = Seen(quiet_gaps=gaps), Leaks()
    # The builtin engine promises what others do not: the same answer, whatever runs beside it.
    if all(process["kind"] in ("builtin", "proxy") for process in status["processes"]):
        seen.unsteady = unsteady
    schedule = _Schedule(name, faults, seconds, every, frozen, back_within, rng, str(status["source"]))
    try:
        asyncio.run(_under_load(endpoint, asked, texts, streams, seen, schedule, leaked))
    except KeyboardInterrupt:
        console.note(f"{console.paint('warning:', 'yellow', sys.stderr)} interrupted; this is what was seen until then")
    leaks = _leaks(name)
    tokens = _differences(endpoint, seen)
    if as_json:
        console.out(json.dumps(_measurements(seen, tokens, leaked, leaks), indent=2))
    else:
        _tell(seen, tokens, leaked, leaks)
    raise Verdict(1 if seen.broken or leaks else 0)


def _in_quiet(endpoint: Endpoint, asked: list[Asked], streams: int) -> tuple[list[str | None], list[float]]:
    """What each is answered while nothing is broken (None: now this, now that), and the gaps between tokens. Raises
    PdctlError."""
    from pdctl.bench.chaos import expected

    console.note(f"asking {len(asked)} requests in quiet, {streams} at once ...")
    try:
        return asyncio.run(expected(endpoint, asked, streams))
    except ValueError as failure:
        raise PdctlError(f"in quiet already: {failure}", "pdctl status, pdctl logs") from None


async def _under_load(
    endpoint: Endpoint, asked: list[Asked], texts: list[str | None], streams: int, seen: Seen, schedule: _Schedule,
    leaked: Leaks,
) -> None:  # fmt: skip
    """However it ends, nothing more is broken afterwards: threads do not end with their task."""
    from pdctl.bench.chaos import load

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(endpoint, asked, texts, streams, seen, lambda: schedule.is_over))
            tasks.create_task(asyncio.to_thread(schedule.carry_out, seen))
            tasks.create_task(asyncio.to_thread(leaked.watch, schedule.service, schedule.wait))
    finally:
        schedule.stop()


def _check(faults: list[str], names: list[str], rng: random.Random, run_dir: Path) -> None:
    from pdctl.bench.chaos import pick
    from pdctl.supervisor.rundir.adoption import read_adoptable

    for word in faults:
        what = word.partition(":")[0]
        if what not in _FAULTS or pick(names, [word], rng) is None:
            hint = f"such as kill:decode; groups here: {', '.join(sorted({n.rpartition('-')[0] or n for n in names}))}"
            raise PdctlError(f"--fault {word!r} breaks nothing here", hint)
        if word.endswith(f":{SUPERVISOR}") and (what != "kill" or read_adoptable(run_dir) is None):
            hint = 'kill:supervisor, and on_supervisor_death = "survive" under [supervisor]'
            raise PdctlError(f"--fault {word!r}: this service ends with its supervisor", hint)


class _Schedule:
    """One fault after another, each when the service is whole again. Runs in a thread of its own."""

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
        """Whether the load may end."""
        return self._over.is_set()

    def wait(self, seconds: float) -> bool:
        """So long, or until it is over; whether it is."""
        return self._over.wait(seconds)

    def stop(self) -> None:
        """No further fault."""
        self._over.set()

    def carry_out(self, seen: Seen) -> None:
        """Until the time is over; what was broken last is waited for."""
        try:
            next_at = time.monotonic() + self._every
            while next_at < self._end and not self.wait(max(0.0, next_at - time.monotonic())):
                self._one(seen)
                # Not in step with anything that happens every so many seconds.
                next_at = max(next_at + self._every * self._rng.uniform(0.9, 1.1), time.monotonic())
            self.wait(max(0.0, self._end - time.monotonic()))
        finally:
            self._over.set()

    def _one(self, seen: Seen) -> None:
        from pdctl.bench.chaos import Fault, carry_out, pick

        # One that was given up has no pid: nothing of it can be broken, and it has been told of.
        status = self._status()
        pids_of = {process["name"]: int(process["pid"]) for process in status["processes"] if process["pid"]}
        chosen = pick([*sorted(pids_of), *([SUPERVISOR] if pids_of else [])], self._faults, self._rng)
        if chosen is None:
            return
        what, name = chosen
        pids = (int(status["supervisor_pid"]),) if name == SUPERVISOR else _tree(pids_of[name])
        fault = Fault(what, name, pids)
        began = time.monotonic()
        seen.faults.append(fault)
        seen.fault_times.append(began)
        console.note(f"{what} {name}; so far {seen.answered} answered, {sum(seen.failed.values())} failed, "
                     f"{seen.wrong} wrong")  # fmt: skip
        carry_out(fault, self._frozen, self.wait)
        if name == SUPERVISOR:
            seconds = self._taken_over(began)
        else:
            seconds = self._ready_again(name, fault.pids[0] if what == "kill" else 0, began)
        # Where we were told to stop, nobody knows whether it would have come back.
        if seconds is not None or not self._over.is_set():
            seen.recovered.append(seconds)

    def _taken_over(self, began: float) -> float | None:
        """Start pdctl again, as its user or systemd would."""
        words = ["up", "-d", *(["-f", self._source] if Path(self._source).is_file() else [])]
        try:
            # Out of the terminal's reach: a Ctrl-C must not leave the service without a supervisor.
            done = subprocess.run(
                [sys.executable, "-m", "pdctl", *words], capture_output=True, timeout=self._back_s, check=False,
                start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
        return time.monotonic() - began if done.returncode == 0 else None

    def _ready_again(self, name: str, old_pid: int, began: float) -> float | None:
        while time.monotonic() - began < self._back_s and not self.is_over:
            now = next((p for p in self._status()["processes"] if p["name"] == name), None)
            if now is not None and now["state"] == "ready" and now["pid"] != old_pid:
                return time.monotonic() - began
            self.wait(_LOOK_S)
        return None

    def _status(self) -> Status:
        """Without processes where no supervisor answers."""
        try:
            return call(self.service, "GET", STATE)
        except (NotRunning, NotAnswering):
            return {"processes": []}


def _tree(pid: int) -> tuple[int, ...]:
    import psutil

    try:
        leader = psutil.Process(pid)
        return (pid, *(child.pid for child in leader.children(recursive=True)))
    except psutil.NoSuchProcess:
        return (pid,)


def _leaks(service: str) -> list[str]:
    """Leases that are left a little after the last request has ended, or why that is not known."""
    deadline = time.monotonic() + _LEASES_S
    while True:
        try:
            found = call(service, "GET", "/v1/kv")
        except PdctlError as failure:
            return [f"not known: {failure.message}"]
        left = [f"{lease['engine']}: {lease['id']}, {lease['blocks']} blocks" for lease in found["leases"]]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_LOOK_S)


def _differences(endpoint: Endpoint, seen: Seen) -> Difference:
    """In tokens as the service cuts texts, or in words where it does not or no longer answers."""
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
    for pair in seen.differing:
        ids = [cut(text) for text in pair]
        # Both in one way, or their numbers mean nothing.
        whole = all(cut_ or not text for cut_, text in zip(ids, pair, strict=True))
        found += difference(*ids) if whole else difference(*(text.split() for text in pair))
    return found


def _by_fault(seen: Seen) -> dict[str, list[float | None]]:
    """Seconds to recover, by what was done to which group."""
    found: dict[str, list[float | None]] = {}
    for fault, seconds in zip(seen.faults, seen.recovered, strict=False):
        group = fault.name.rpartition("-")[0] or fault.name
        found.setdefault(f"{fault.what} {group}", []).append(seconds)
    return found


def _measurements(seen: Seen, tokens: Difference, leaked: Leaks, leaks: list[str]) -> dict[str, object]:
    """As `--json` prints them. Times in seconds."""
    from pdctl.bench.metrics import percentile

    back = [seconds for seconds in seen.recovered if seconds is not None]
    return {
        "faults": len(seen.faults),
        "answered": seen.answered,
        "failed": seen.failed,
        "truncated": seen.truncated,
        "unsteady": seen.unsteady,
        "compared": seen.compared,
        "wrong": seen.wrong,
        "tokens": {"lost": tokens.lost, "repeated": tokens.repeated, "other": tokens.other},
        "leases_left": leaks,
        "leaked_block_s": leaked.block_seconds,
        "leaked_most_blocks": leaked.most_blocks,
        "leak_looks": leaked.looks,
        "by_fault": {name: {"faults": len(all_), "ready_again_s": all_} for name, all_ in _by_fault(seen).items()},
        "pause_s": {f"p{part}": percentile(seen.pauses, part) for part in (50, 99, 100)},
        "quiet_gap_s": {f"p{part}": percentile(seen.quiet_gaps, part) for part in (50, 99, 100)},
        "ready_again_s": {f"p{part}": percentile(back, part) for part in (50, 100)},
        "broken": _broken(seen, leaks),
    }


def _broken(seen: Seen, leaks: list[str]) -> list[str]:
    return [*seen.broken, *([f"{len(leaks)} leases are left"] if leaks else [])]


def _tell(seen: Seen, tokens: Difference, leaked: Leaks, leaks: list[str]) -> None:
    """For people."""
    console.out(f"{len(seen.faults)} faults: {seen.answered} answered, {sum(seen.failed.values())} failed, "
                f"{seen.truncated} cut, {seen.wrong} wrong, {len(leaks)} leases left")  # fmt: skip
    console.out(f"tokens: {tokens.lost} lost, {tokens.repeated} twice, {tokens.other} others, in {seen.compared} "
                "answers that were compared")  # fmt: skip
    console.out(f"KV of holders that were gone: {leaked.block_seconds:.1f} block-seconds, {leaked.most_blocks} blocks "
                f"at most, in {leaked.looks} looks")  # fmt: skip
    console.out(console.table(["", "P50", "P99", "WORST"], [
        _row("between tokens, in quiet", seen.quiet_gaps),
        _row("longest silence of a stream that met a fault", seen.pauses),
        *(
            _row(f"ready again after: {name}, {len(all_)} times", [s for s in all_ if s is not None])
            for name, all_ in sorted(_by_fault(seen).items())
        ),
    ]))  # fmt: skip
    for reason, count in sorted(seen.failed.items(), key=lambda entry: -entry[1])[:5]:
        console.note(f"failed {count} times: {reason}")
    for promise in _broken(seen, leaks):
        console.note(f"BROKEN: {promise}")


def _row(title: str, seconds: list[float]) -> list[str]:
    from pdctl.bench.metrics import percentile

    return [title, *(f"{percentile(seconds, part):.2f} s" if seconds else "-" for part in (50, 99, 100))]
