"""pdctl's supervisor, supervisord, circus, runit and s6 with the same children, in one run.

    python -m benchmarks.supervisors [--rounds 3] [--kills 8] [--fleet 200] [--only pdctl,runit]

Peers are installed from PyPI (supervisor, circus) and from Debian (s6 installed, runit only unpacked). A child is a
shell that writes its start time and becomes `sleep`. For each supervisor, in turn: time from SIGKILL of a child until
its replacement runs, start time of 3 and 50 children, resident memory, idle CPU, duration of the status command, and
what a SIGKILL of the supervisor leaves. Then only pdctl with `--fleet` children: CPU when idle, and while 50 crash.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.proxy.peers import installed
from tests.supervisor.fleet import plan_of, shell

PATIENCE_S = 60.0
IDLE_S = 5.0
_CHILD = '#!/bin/sh\necho "$1 $$ $(date +%s%N)" >> "$2"\nexec sleep 100000\n'


@dataclass
class Setting:
    """A supervisor's configuration for some children. `log`: where children write their start times."""

    argv: list[str]
    status: list[str]
    log: Path
    stdin: bytes = b""
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Measurements:
    """Milliseconds, MB and percent of a core."""

    restarts: list[float] = field(default_factory=list)
    start: dict[int, list[float]] = field(default_factory=lambda: {3: [], 50: []})
    rss: dict[int, float] = field(default_factory=dict)
    idle: float = 0.0
    status: list[float] = field(default_factory=list)
    after_kill: str = ""


Make = Callable[[Path, int], Setting]


def begun(log: Path) -> list[tuple[str, int, int]]:
    """(child, pid, nanoseconds since 1970) of each start."""
    if not log.exists():
        return []
    lines = [line.split() for line in log.read_text().splitlines()]
    return [(words[0], int(words[1]), int(words[2])) for words in lines if len(words) == 3]


def wait(reached: Callable[[], bool]) -> bool:
    """Poll every two milliseconds: the measured times are those that the child wrote."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if reached():
            return True
        time.sleep(0.002)
    return False


# -- how each is set up ------------------------------------------------------------------------------------


def child(folder: Path) -> Path:
    script = folder / "child.sh"
    script.write_text(_CHILD)
    script.chmod(0o755)
    return script


def ours(folder: Path, count: int) -> Setting:
    log, script = folder / "starts.log", child(folder)
    processes = [shell(f"c{number}", f"exec {script} c{number} {log}") for number in range(count)]
    plan = plan_of(folder, *processes, max_restarts=1000, within_s=1.0, stable_s=1.0, grace_s=5.0)
    body = json.dumps(plan.to_dict()).encode()
    env = {"PDCTL_RUN": str(folder / "run"), "PDCTL_STATE": str(folder / "state")}
    status = [sys.executable, "-m", "pdctl", "status", "-s", "fleet"]
    return Setting([sys.executable, "-m", "pdctl.supervisor"], status, log, body, env)


def supervisord(folder: Path, count: int) -> Setting:
    bin_, log, script = (
        installed(cache() / "supervisor", "supervisor==4.3.0", "setuptools<81"),
        folder / "starts.log",
        child(folder),
    )
    text = (
        f"[unix_http_server]\nfile={folder}/s.sock\n[supervisord]\nnodaemon=true\nlogfile={folder}/s.log\n"
        f"pidfile={folder}/s.pid\nchildlogdir={folder}\n[rpcinterface:supervisor]\n"
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n"
        f"[supervisorctl]\nserverurl=unix://{folder}/s.sock\n"
    )
    for number in range(count):
        text += f"[program:c{number}]\ncommand={script} c{number} {log}\nautorestart=true\n"
    (folder / "s.conf").write_text(text)
    arguments = ["-c", f"{folder}/s.conf"]
    return Setting([f"{bin_}/supervisord", *arguments], [f"{bin_}/supervisorctl", *arguments, "status"], log)


def circus(folder: Path, count: int) -> Setting:
    bin_, log, script = installed(cache() / "circus", "circus==0.19.0"), folder / "starts.log", child(folder)
    text = f"[circus]\nendpoint = ipc://{folder}/ep\npubsub_endpoint = ipc://{folder}/ps\n"
    for number in range(count):
        text += f"[watcher:c{number}]\ncmd = {script} c{number} {log}\n"
    (folder / "c.ini").write_text(text)
    status = [f"{bin_}/circusctl", "--endpoint", f"ipc://{folder}/ep", "status"]
    return Setting([f"{bin_}/circusd", f"{folder}/c.ini"], status, log)


def runit(folder: Path, count: int) -> Setting:
    root = unpacked("runit")
    env = {"PATH": f"{root}/usr/bin:{root}/usr/sbin:{root}/bin:{root}/sbin:{os.environ['PATH']}"}
    scan, log = services(folder, count)
    sv = shutil.which("sv", path=env["PATH"])
    assert sv is not None
    runsvdir = shutil.which("runsvdir", path=env["PATH"])
    assert runsvdir is not None
    return Setting([runsvdir, str(scan)], [sv, "status", *(f"{scan}/c{n}" for n in range(count))], log, env=env)


def s6(folder: Path, count: int) -> Setting:
    if shutil.which("s6-svscan") is None:
        # Its programs expect each other in /usr/bin, so it must be installed; that starts nothing.
        subprocess.run(["apt-get", "install", "-y", "-qq", "s6"], check=True, stdout=subprocess.DEVNULL)
    scan, log = services(folder, count)
    return Setting(["s6-svscan", str(scan)], ["s6-svstat", f"{scan}/c0"], log)


def services(folder: Path, count: int) -> tuple[Path, Path]:
    """A scan directory for runit and s6."""
    log, script, scan = folder / "starts.log", child(folder), folder / "scan"
    for number in range(count):
        run = scan / f"c{number}" / "run"
        run.parent.mkdir(parents=True)
        run.write_text(f"#!/bin/sh\nexec {script} c{number} {log}\n")
        run.chmod(0o755)
    return scan, log


def unpacked(*packages: str) -> Path:
    """Unpack Debian packages into a folder, without installing them."""
    root = cache() / packages[0]
    if not (root / "done").exists():
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", *packages], cwd=root, check=True)
        for archive in root.glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, root], check=True)
        (root / "done").touch()
    return root


def cache() -> Path:
    return Path(tempfile.gettempdir()) / "pdctl-benchmark-supervisors"


MAKERS: dict[str, Make] = {"pdctl": ours, "runit": runit, "s6": s6, "supervisord": supervisord, "circus": circus}


# -- what is measured --------------------------------------------------------------------------------------


@contextmanager
def running(make: Make, count: int) -> Iterator[tuple[subprocess.Popen[bytes], Setting, float]]:
    """A supervisor with all children started, and how long that took, ms."""
    folder = Path(tempfile.mkdtemp(prefix="bs-", dir="/tmp"))
    setting = make(folder, count)
    with (folder / "out").open("wb") as out:
        started = time.time_ns()
        process = subprocess.Popen(
            setting.argv, stdin=subprocess.PIPE, stdout=out, stderr=out, env={**os.environ, **setting.env}, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(setting.stdin)
    process.stdin.close()
    try:
        if not wait(lambda: len({name for name, _, _ in begun(setting.log)}) >= count):
            raise RuntimeError(f"not all began: {(folder / 'out').read_text()[-2000:]}")
        yield process, setting, (max(at for _, _, at in begun(setting.log)) - started) / 1e6
    finally:
        end(process, setting)
        shutil.rmtree(folder, ignore_errors=True)


def end(process: subprocess.Popen[bytes], setting: Setting) -> None:
    """End the supervisor, and by pid all processes that it leaves."""
    family: list[psutil.Process] = []
    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    for victim in (process.pid, *(found.pid for found in family)):
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    process.wait()
    for _, pid, _ in begun(setting.log):
        with suppress(psutil.Error):
            if psutil.Process(pid).name() == "sleep":
                os.kill(pid, signal.SIGKILL)


def overseers(pid: int) -> list[psutil.Process]:
    """The supervisor and its helpers, without the children."""
    found = psutil.Process(pid)
    return [found, *(p for p in found.children(recursive=True) if p.name() not in ("sleep", "child.sh"))]


def restart_ms(setting: Setting, name: str) -> float:
    """Time from SIGKILL to the start time that the replacement wrote."""
    before = begun(setting.log)
    pid = next(pid for found, pid, _ in reversed(before) if found == name)
    at = time.time_ns()
    os.kill(pid, signal.SIGKILL)
    if not wait(lambda: any(found == name for found, _, _ in begun(setting.log)[len(before) :])):
        return float("nan")
    return (next(then for found, _, then in begun(setting.log)[len(before) :] if found == name) - at) / 1e6


def cpu_s(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(found.user + found.system for found in times)


def measure(make: Make, into: Measurements, kills: int) -> None:
    for count in (3, 50):
        with running(make, count) as (process, setting, took):
            into.start[count].append(took)
            time.sleep(2.0)
            above = overseers(process.pid)
            into.rss[count] = sum(found.memory_info().rss for found in above) / 1e6
            if count == 3:
                for number in range(kills):
                    into.restarts.append(restart_ms(setting, f"c{number % 3}"))
                    # Not synchronous with any supervisor's polling.
                    time.sleep(1.5 + 0.137 * number % 1)
                before = cpu_s(above)
                time.sleep(IDLE_S)
                into.idle = (cpu_s(above) - before) / IDLE_S * 100
            for _ in range(5):
                began = time.perf_counter()
                subprocess.run(setting.status, env={**os.environ, **setting.env}, capture_output=True, check=False)
                if count == 50:
                    into.status.append((time.perf_counter() - began) * 1e3)
    into.after_kill = after_kill(make)


def after_kill(make: Make) -> str:
    with running(make, 3) as (process, setting, _):
        time.sleep(1.0)
        process.kill()
        process.wait()
        time.sleep(1.0)
        left = [
            pid
            for _, pid, _ in begun(setting.log)
            if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"
        ]
        return f"{len(left)} of 3 children"


def fleet(count: int, crashes: int) -> None:
    """Only pdctl: many children, idle and while some crash."""
    with running(ours, count) as (process, setting, took):
        time.sleep(3.0)
        above = [psutil.Process(process.pid)]
        before = cpu_s(above)
        time.sleep(4 * IDLE_S)
        idle = (cpu_s(above) - before) / (4 * IDLE_S) * 100
        known = begun(setting.log)
        latest = {name: pid for name, pid, _ in known}
        before, at = cpu_s(above), time.time_ns()
        for number in range(crashes):
            os.kill(latest[f"c{number}"], signal.SIGKILL)
        assert wait(lambda: len(begun(setting.log)) >= len(known) + crashes)
        time.sleep(0.2)
        last = (max(then for _, _, then in begun(setting.log)) - at) / 1e6
        spent = (cpu_s(above) - before) * 1e3
        rss = above[0].memory_info().rss / 1e6
        print(f"pdctl, {count} children: up in {took:.0f} ms, {rss:.0f} MB, idle {idle:.2f}% of a core")
        print(
            f"  {crashes} of them killed at once: the last is back after {last:.0f} ms, {spent:.0f} ms of CPU for all"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--fleet", type=int, default=200)
    parser.add_argument("--only", default=",".join(MAKERS))
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    found = {name: Measurements() for name in names}
    for number in range(arguments.rounds):
        for name in names:
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            measure(MAKERS[name], found[name], arguments.kills)
    print("| supervisor | restart after SIGKILL, median (max) ms | 3 up, ms | 50 up, ms | MB 3 / 50 | idle % ", end="")
    print("| status ms | SIGKILL leaves |\n|---|---|---|---|---|---|---|---|")
    for name, measurements in found.items():
        restarts = f"{statistics.median(measurements.restarts):.1f} ({max(measurements.restarts):.0f})"
        start = [f"{statistics.median(measurements.start[count]):.0f}" for count in (3, 50)]
        rss = f"{measurements.rss[3]:.1f} / {measurements.rss[50]:.1f}"
        status = f"{statistics.median(measurements.status):.0f}"
        cells = (name, restarts, *start, rss, f"{measurements.idle:.2f}", status, measurements.after_kill)
        print(f"| {' | '.join(cells)} |")
    if "pdctl" in names and arguments.fleet:
        fleet(arguments.fleet, min(50, arguments.fleet))
    return 0


if __name__ == "__main__":
    sys.exit(main())
