"""Misbehaving children under a real supervisor. Each shows one observed failure of engines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from pdctl.control_api import client
from pdctl.errors import NotAnswering, NotRunning, PdctlError
from pdctl.host.processes.claims import PortClaims, claimed_ports
from pdctl.plan import Plan, Probe
from pdctl.supervisor.process.tree import Trees
from pdctl.wire import EXIT_PORTS_TAKEN
from tests.service import last_exit_of, pid_of, wait_until
from tests.supervisor.fleet import AT_ONCE, Fields, Fleet, child, fleet, python, shell

SLEEP = "exec sleep 600"
SERVER = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"running": 1, "tokens_total": 7}).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


def http_probe(port: int, state: bool = False, alive: bool = True, startup_s: float = 20.0) -> Probe:
    url = f"http://127.0.0.1:{port}/"
    return Probe(url, url if alive else "", url if state else "", "", 0.02, 1.0, startup_s)


def has_cgroups(folder: Path) -> bool:
    trees = Trees(f"TEST={folder}")
    trees.close()
    return trees.method == "cgroup"


@pytest.fixture(params=["cgroup", "sweep"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ...]:
    """How to start a supervisor with or without cgroups."""
    if request.param == "cgroup":
        if not has_cgroups(tmp_path):
            pytest.skip("cgroup v2 is not writable here")
        return ()
    if not has_cgroups(tmp_path):
        return ()
    hidden = 'umount -a -t cgroup2; exec "$@"'
    return ("unshare", "--mount", "sh", "-c", hidden, "sh")


def test_the_method_is_as_the_machine_allows(tmp_path: Path, prefix: tuple[str, ...]) -> None:
    with fleet(tmp_path, shell("a", SLEEP), prefix=prefix) as found:
        found.ready("a")
        wanted = "sweep" if prefix or not has_cgroups(tmp_path / "other") else "cgroup"
        assert found.status().trees == wanted


def test_one_that_ignores_term_is_killed_after_its_grace(tmp_path: Path, prefix: tuple[str, ...]) -> None:
    ignoring = "trap '' TERM; echo deaf; while :; do sleep 1; done"
    with fleet(
        tmp_path, shell("deaf", ignoring, probe=Probe("log:^deaf", "", "", "", 0.02, 1, 20)), prefix=prefix
    ) as found:
        found.ready("deaf")
        found.ask("deaf", "stop")
        found.until("deaf", lambda now: now.state == "stopped", "stopped")
        last = found.exits("deaf")[-1]
        assert last["signal"] == "SIGKILL"
        assert str(last["by"]).startswith("pdctl, with SIGKILL")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("(setsid sleep 600 &) ; exec sleep 600", id="own session"),
        pytest.param("( (sleep 600 &) & ) ; exec sleep 600", id="double fork"),
        pytest.param(
            "(setsid sh -c '(trap \"\" TERM HUP INT; sleep 600; sleep 600) & exit' &); exec sleep 600", id="both"
        ),
    ],
)
def test_a_whole_tree_dies_with_its_leader(tmp_path: Path, prefix: tuple[str, ...], script: str) -> None:
    with fleet(tmp_path, shell("tree", script), shell("other", SLEEP), prefix=prefix) as found:
        before = found.ready("tree")
        other = found.ready("other")
        mine = f"{found.plan.run_dir}:tree"

        def members() -> list[psutil.Process]:
            return [p for p in found.stamped() if p.environ().get("PDCTL_UNIT") == mine]

        found.until("tree", lambda _: len(members()) > 1, "a tree")
        old = {process.pid for process in members()}
        os.kill(pid_of(before), signal.SIGKILL)
        found.again("tree", before)
        assert not old & {process.pid for process in found.stamped()}
        assert found.of("other").pid == other.pid, "nobody else was touched"


def test_one_that_never_stops_talking_is_not_blocked_and_fills_no_disk(tmp_path: Path) -> None:
    talk = "i=0; while :; do i=$((i+1)); echo line $i; done"
    with fleet(tmp_path, shell("talker", talk), shell("quiet", SLEEP), log_mb=1.0) as found:
        found.ready("talker")
        log = Path(found.plan.log_dir) / "talker.log"
        archive = log.with_name("talker.log.old")
        found.until("talker", lambda _: archive.exists() and log.stat().st_size > 2 << 20, "cut")
        size = log.stat().st_size
        found.until("talker", lambda _: log.stat().st_size > size, "writing on")
        assert log.stat().st_blocks * 512 < log.stat().st_size
        # The truncated part and the rest form the complete text: no line is lost.
        with log.open("rb") as file:
            file.seek(os.lseek(file.fileno(), 0, os.SEEK_DATA))
            after = file.read(4096).lstrip(b"\0")
        seam = archive.read_bytes()[-40:] + after[:40]
        numbers = [int(word) for line in seam.split(b"\n")[1:-1] for word in line.split()[1:]]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert found.of("quiet").state == "ready"


def test_one_that_is_never_ready_uses_up_its_restarts_and_takes_the_start_down(tmp_path: Path) -> None:
    slow = shell("slow", SLEEP, probe=http_probe(1, startup_s=0.1))
    with fleet(tmp_path, slow, shell("fine", SLEEP), max_restarts=1) as found:
        found.process.wait(30)
        assert found.process.returncode == 1
        assert "error: the service did not start: slow not ready in time; 2 failed starts" in found.log()
        assert [entry["reason"] for entry in found.exits("slow")] == ["killed by SIGKILL"] * 2


def test_one_that_flaps_ends_in_failed_and_comes_back_when_asked(tmp_path: Path) -> None:
    flapping = shell("flapping", "sleep 0.05; exit 7")
    with fleet(tmp_path, flapping, shell("fine", SLEEP), max_restarts=2) as found:
        found.until("flapping", lambda now: now.state == "failed", "failed")
        assert "exited with code 7; 3 exits within 60 s" in found.of("flapping").reason
        assert found.of("fine").state == "ready"
        before = found.of("flapping").restarts
        found.ask("flapping", "start")
        found.until("flapping", lambda now: now.restarts > before, "started again")


@pytest.mark.parametrize("code", [2, 64, 78])
def test_codes_that_a_restart_cannot_cure(tmp_path: Path, code: int) -> None:
    starting = replace(AT_ONCE, ready="log:never")
    # The service did not start, so it ends. The other process takes its time, and the state can be looked at.
    slow = shell("slow", "trap '' TERM; while :; do sleep 0.1; done")
    with fleet(tmp_path, shell("bad", f"sleep 0.1; exit {code}", probe=starting), slow, grace_s=20.0) as found:
        found.until("bad", lambda now: now.state == "failed", "failed")
        assert found.of("bad").restarts == 0
        assert found.of("bad").reason == f"exited with code {code}: a restart would not help"


@pytest.mark.parametrize("code", [0, 1, 126, 127, 255])
def test_other_codes_are_restarted(tmp_path: Path, code: int) -> None:
    with fleet(tmp_path, shell("bad", f"sleep 0.1; exit {code}"), max_restarts=100) as found:
        now = found.until("bad", lambda now: now.restarts > 0, "restarted")
        assert last_exit_of(now).code == code
        assert last_exit_of(now).by == "itself"


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_signals_are_told_apart(tmp_path: Path, name: str) -> None:
    with fleet(tmp_path, shell("victim", SLEEP)) as found:
        before = found.ready("victim")
        os.kill(pid_of(before), signal.Signals[name])
        now = found.again("victim", before)
        assert last_exit_of(now).signal == name
        crash = name in ("SIGSEGV", "SIGABRT")
        assert ("a crash" in last_exit_of(now).by) == crash
        assert ("pdctl did not send the signal" in last_exit_of(now).by) != crash


def test_one_that_hangs_but_answers_is_killed_for_its_silence(tmp_path: Path) -> None:
    hung = python("hung", SERVER)
    hung = python("hung", SERVER, ports=hung.ports, probe=http_probe(hung.ports["http"], state=True))
    with fleet(tmp_path, hung, shell("fine", SLEEP)) as found:
        before = found.ready("hung")
        found.again("hung", before)
        reasons = [event["message"] for event in found.events() if event["event"] == "not_alive"]
        assert str(reasons[0]).startswith("hung: 1 requests are running, but no token for")
        assert "hung" in str(found.exits("hung")[0]["by"])


def test_one_that_stops_answering_is_killed(tmp_path: Path) -> None:
    server = python("server", SERVER)
    server = python("server", SERVER, ports=server.ports, probe=http_probe(server.ports["http"]))
    with fleet(tmp_path, server) as found:
        before = found.ready("server")
        os.kill(pid_of(before), signal.SIGSTOP)
        found.again("server", before)
        assert "probes in a row failed" in found.log()


def test_what_answers_with_a_token_is_asked_for_one(tmp_path: Path) -> None:
    """The functional probe: GETs are answered, POSTs fail."""
    server = python("server", SERVER)
    url = f"http://127.0.0.1:{server.ports['http']}/"
    idle = SERVER.replace('"running": 1', '"running": 0')
    server = python("server", idle, ports=server.ports, probe=Probe(url, url, url, url, 0.02, 1, 20))
    with fleet(tmp_path, server, functional_s=0.1) as found:
        before = found.ready("server")
        found.again("server", before)
        assert "a one-token request was answered with 501" in found.log()


def test_a_port_that_a_stranger_took_is_named_and_waited_for(tmp_path: Path) -> None:
    spec = shell("victim", SLEEP)
    with fleet(tmp_path, spec) as found:
        before = found.ready("victim")
        with socket.socket() as stranger:
            stranger.bind(("127.0.0.1", spec.ports["http"]))
            stranger.listen()
            os.kill(pid_of(before), signal.SIGKILL)
            now = found.until("victim", lambda now: "is in use by" in now.reason, "blocked")
            assert now.state == "clearing"
            assert f"its http port {spec.ports['http']} is in use by pid {os.getpid()}" in now.reason
        found.again("victim", before)


def test_a_leaked_port_dies_with_its_tree(tmp_path: Path, prefix: tuple[str, ...]) -> None:
    leak = (
        "import os, socket, subprocess, sys\n"
        "s = socket.socket(); s.bind(('127.0.0.1', int(os.environ['PORT']))); s.listen(); s.set_inheritable(True)\n"
        "subprocess.Popen(['setsid', 'sleep', '600'], close_fds=False)\n"
        "print('listening', flush=True)\n"
        "sys.stdin.read(0); import time; time.sleep(600)\n"
    )
    spec = python("leaky", leak, probe=Probe("log:^listening", "", "", "", 0.02, 1, 20))
    with fleet(tmp_path, spec, prefix=prefix) as found:
        before = found.ready("leaky")
        os.kill(pid_of(before), signal.SIGKILL)
        found.again("leaky", before)


def test_what_runs_out_of_memory_is_said_to(tmp_path: Path) -> None:
    """In its own memory cgroup, by the kernel's OOM killer."""
    group = next((path for path in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if _makes(path)), None)
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    mine = group / f"pdctl-test-{os.getpid()}"
    mine.mkdir()
    try:
        limit = mine / ("memory.limit_in_bytes" if (mine / "memory.limit_in_bytes").exists() else "memory.max")
        limit.write_text(str(30 << 20))
        swap = mine / ("memory.memsw.limit_in_bytes" if limit.name != "memory.max" else "memory.swap.max")
        with suppress(OSError):
            swap.write_text(str(30 << 20) if limit.name != "memory.max" else "0")
        told = tmp_path / "told"
        eat = (
            f"import os, time\nwhile not os.path.exists('{told}'): time.sleep(0.01)\n"
            f"open('{mine}/cgroup.procs', 'w').write('0')\nb = [bytearray(1 << 20) for _ in range(400)]"
        )
        with fleet(tmp_path, python("greedy", eat), shell("fine", SLEEP), max_restarts=0) as found:
            # A death before all are ready would end the service.
            found.ready("greedy")
            found.ready("fine")
            told.touch()
            found.until("greedy", lambda now: now.state == "failed", "failed")
            last = found.exits("greedy")[0]
            assert last["oom"] is True
            assert last["by"] == "the kernel, out of memory"
            lines = last["kernel"]
            assert isinstance(lines, list)
            assert any("greedy" in line or "Killed process" in line or "oom" in line.lower() for line in lines)
    finally:
        mine.rmdir()


def _makes(folder: Path) -> bool:
    probe = folder / f"pdctl-probe-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError:
        return False
    found = (probe / "memory.limit_in_bytes").exists() or (probe / "memory.max").exists()
    probe.rmdir()
    return found and os.access("/dev/kmsg", os.R_OK)


def test_a_supervisor_that_is_killed_takes_its_children_with_it(tmp_path: Path, prefix: tuple[str, ...]) -> None:
    with fleet(tmp_path, shell("a", SLEEP), shell("b", SLEEP), prefix=prefix) as found:
        found.ready("a")
        found.ready("b")
        found.process.kill()
        found.process.wait()
        deadline = time.monotonic() + 300
        while found.stamped() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not found.stamped()


def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system cannot be mounted here")
    small = tmp_path / "logs"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], check=True)
    try:
        talk = (
            "while :; do echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 2>/dev/null; done"
        )
        with fleet(tmp_path, shell("talker", talk), shell("victim", SLEEP)) as found:
            before = found.ready("victim")
            found.until("victim", lambda _: shutil.disk_usage(small).free == 0, "on a full disk")
            os.kill(pid_of(before), signal.SIGKILL)
            found.again("victim", before)
    finally:
        subprocess.run(["umount", small], check=True)


def test_fifty_children_crash_at_once(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(50)]
    with fleet(tmp_path, *(shell(name, SLEEP) for name in names)) as found:
        for name in names:
            found.ready(name)
        before = {process.name: process for process in found.status().processes}
        for process in before.values():
            os.kill(pid_of(process), signal.SIGKILL)
        for name in names:
            found.again(name, before[name])


def test_restart_with_takes_the_peer_along(tmp_path: Path) -> None:
    with fleet(tmp_path, shell("first", SLEEP), shell("second", SLEEP, restart_with=("first",))) as found:
        first, second = found.ready("first"), found.ready("second")
        os.kill(pid_of(first), signal.SIGKILL)
        found.again("first", first)
        found.again("second", second)
        assert last_exit_of(found.of("second")).expected
        now = found.of("first")
        os.kill(pid_of(found.of("second")), signal.SIGKILL)
        found.until("second", lambda s: s.restarts == 2 and s.state == "ready", "ready again")
        assert found.of("first").pid == now.pid, "one way only"


def test_children_get_what_the_plan_says(tmp_path: Path) -> None:
    """Environment, affinity, limits, descriptors: reported by the child and compared with the plan."""
    dump = (
        "import json, os, resource, sys\n"
        "print(json.dumps({'env': dict(os.environ), 'cpus': sorted(os.sched_getaffinity(0)),\n"
        " 'nofile': resource.getrlimit(resource.RLIMIT_NOFILE),\n"
        " 'memlock': resource.getrlimit(resource.RLIMIT_MEMLOCK),\n"
        " 'fds': sorted(os.listdir('/proc/self/fd')), 'session': os.getsid(0) == os.getpid(),\n"
        " 'cgroup': open('/proc/self/cgroup').read()}), flush=True)\n"
        "import time; time.sleep(600)"
    )
    import resource

    cpu = max(os.sched_getaffinity(0))
    spec = python("dump", dump, cpus=(cpu,), env={"WANTED": "a b"}, probe=Probe("log:^{", "", "", "", 0.02, 1, 20))
    with fleet(tmp_path, spec) as found:
        status = found.ready("dump")
        told = json.loads(found.output("dump").splitlines()[0])
        assert told["cpus"] == [cpu]
        assert told["env"]["WANTED"] == "a b"
        assert told["env"]["PDCTL_EPOCH"] == status.epoch
        assert told["env"]["PDCTL_UNIT"] == f"{found.plan.run_dir}:dump"
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        assert told["nofile"] == [hard, hard]
        hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        assert told["memlock"] == [hard, hard]
        assert told["fds"][:3] == ["0", "1", "2"]
        assert len(told["fds"]) == 4, "nothing inherited but input, output and the listing itself"
        assert told["session"]
        if found.status().trees == "cgroup":
            assert "/dump" in told["cgroup"]


def test_pid_1_reaps_and_ends_by_a_signal(tmp_path: Path) -> None:
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("no pid namespace can be made here")
    orphans = "while :; do (sh -c 'sleep 0.01 &' &); sleep 0.02; done"
    prefix = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    with fleet(tmp_path, shell("parent", orphans), prefix=prefix) as found:
        found.ready("parent")
        supervisor = psutil.Process(found.process.pid).children()[0]
        found.until("parent", lambda _: len(supervisor.children()) > 0, "a parent")
        zombies = [p for p in supervisor.children() if p.status() == psutil.STATUS_ZOMBIE]
        assert len(zombies) < 200
        supervisor.send_signal(signal.SIGTERM)
        found.process.wait(30)


@pytest.fixture
def gpu_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real pynvml over a stub driver with one GPU; the file lists the processes that use it."""
    stub = Path(__file__).parents[1] / "fakes" / "nvml_stub.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libnvidia-ml.so.1", stub], check=True)
    use = tmp_path / "use"
    use.write_text("")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("PDCTL_STUB_GPUS", "1")
    monkeypatch.setenv("PDCTL_STUB_USE", str(use))
    return use


def test_nothing_is_started_before_its_gpu_memory_is_back(tmp_path: Path, gpu_users: Path) -> None:
    """A foreign process stays on the GPU for a while."""
    with fleet(tmp_path, shell("engine", SLEEP, gpus=("GPU-stub-0",), device="cuda")) as found:
        before = found.ready("engine")
        gpu_users.write_text(f"0 {before.pid} {10 << 30}\n")
        assert found.of("engine").gpu_memory_bytes == 10 << 30
        gpu_users.write_text(f"0 {os.getpid()} {10 << 30}\n")
        os.kill(pid_of(before), signal.SIGKILL)
        now = found.until("engine", lambda now: "GPU-stub-0" in now.reason, "blocked")
        assert now.state == "clearing"
        assert f"has 10.0 GiB in use, but 0.0 GiB before the start: held by pids [{os.getpid()}]" in now.reason
        gpu_users.write_text(f"0 {os.getpid()} {100 << 20}\n")
        found.again("engine", before)


def test_gpu_memory_whose_holder_has_no_name_is_not_waited_for_for_ever(tmp_path: Path, gpu_users: Path) -> None:
    """In virtual machines drivers report pids that do not exist here; the memory may belong to another engine."""
    with fleet(tmp_path, shell("engine", SLEEP, gpus=("GPU-stub-0",), device="cuda")) as found:
        before = found.ready("engine")
        gpu_users.write_text(f"0 {2**22 + 1} {10 << 30}\n")
        assert found.of("engine").gpu_memory_bytes is None
        os.kill(pid_of(before), signal.SIGKILL)
        found.until("engine", lambda now: "the driver has not freed it yet" in now.reason, "blocked")
        found.again("engine", before)


def test_a_neighbours_child_on_the_same_gpu_is_no_stranger(tmp_path: Path, gpu_users: Path) -> None:
    """Two engines share a GPU; the memory is held by a child of the started process."""
    parent = "sleep 600 & wait"
    shared: Fields = {"gpus": ("GPU-stub-0",), "device": "cuda"}
    with fleet(tmp_path, shell("engine", SLEEP, **shared), shell("beside", parent, **shared)) as found:
        before, beside = found.ready("engine"), found.ready("beside")
        children = psutil.Process(beside.pid).children
        found.until("beside", lambda _: bool(children()), "a child")
        gpu_users.write_text(f"0 {children()[0].pid} {10 << 30}\n")
        os.kill(pid_of(before), signal.SIGKILL)
        found.again("engine", before)


def test_the_logs_of_earlier_lives_are_kept(tmp_path: Path) -> None:
    with fleet(tmp_path, shell("a", "echo life of $PDCTL_EPOCH; exec sleep 600", probe=AT_ONCE)) as found:
        epochs = []
        for _ in range(3):
            now = found.ready("a")
            epochs.append(now.epoch)
            found.until("a", lambda _: "life of" in found.output("a"), "heard")
            os.kill(pid_of(now), signal.SIGKILL)
            found.again("a", now)
        texts = [(Path(found.plan.log_dir) / f"a.log.{n}").read_text() for n in (3, 2, 1)]
        assert [text.split()[-1] for text in texts] == epochs
        assert sys.executable


def test_groups_of_supervisors_that_were_killed_are_removed_by_the_next(tmp_path: Path) -> None:
    if not has_cgroups(tmp_path):
        pytest.skip("cgroup v2 is not writable here")
    with fleet(tmp_path / "a", shell("a", SLEEP)) as found:
        found.ready("a")
        group = found_group(found)
        found.process.kill()
        found.process.wait()
        deadline = time.monotonic() + 300
        while found.stamped() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert group.exists()
    with fleet(tmp_path / "b", shell("b", SLEEP)) as other:
        other.ready("b")
        assert not group.exists()
        mine = found_group(other)
    assert not mine.exists()


def written_down(found: Fleet, count: int) -> Path:
    """The file for a later supervisor, once it lists this many processes."""
    file = Path(found.plan.run_dir) / "adopt.json"
    name = found.plan.processes[0].name
    found.until(name, lambda _: file.exists() and len(json.loads(file.read_text())["processes"]) == count, "written")
    return file


def has_applied(found: Fleet, how: str) -> bool:
    """Whether the last change-over has ended like this."""
    progress = found.status().apply
    return progress is not None and progress.state == how


def killed(found: Fleet) -> None:
    found.process.kill()
    found.process.wait()


def test_what_nobody_wrote_down_is_ended_by_the_next_supervisor(tmp_path: Path) -> None:
    """A process started just before the kill is not adopted, and does not keep its port."""
    with fleet(tmp_path, shell("a", SLEEP), shell("b", SLEEP), on_supervisor_death="survive") as found:
        a, b = found.ready("a"), found.ready("b")
        file = Path(found.plan.run_dir) / "adopt.json"
        found.until(
            "b", lambda _: file.exists() and len(json.loads(file.read_text())["processes"]) == 2, "written down"
        )
        killed(found)
        kept = json.loads(file.read_text())
        kept["processes"] = [entry for entry in kept["processes"] if entry["spec"]["name"] == "a"]
        file.write_text(json.dumps(kept))
        found.start()
        assert found.ready("a").pid == a.pid
        assert found.ready("b").pid != b.pid
        assert not psutil.pid_exists(pid_of(b)) or psutil.Process(b.pid).status() == psutil.STATUS_ZOMBIE


def test_a_kill_in_the_middle_of_an_apply_is_told_as_it_was(tmp_path: Path) -> None:
    """The running process differs from the plan: it is restarted as planned."""
    with fleet(tmp_path, shell("a", SLEEP), shell("b", SLEEP), on_supervisor_death="survive") as found:
        a, b = found.ready("a"), found.ready("b")
        file = Path(found.plan.run_dir) / "adopt.json"
        found.until(
            "b", lambda _: file.exists() and len(json.loads(file.read_text())["processes"]) == 2, "written down"
        )
        killed(found)
        first, second = found.plan.processes
        found.plan = replace(found.plan, processes=(replace(first, argv=("/bin/sh", "-c", "exec sleep 700")), second))
        (Path(found.plan.run_dir) / "plan.json").write_text(json.dumps(found.plan.to_dict()))
        found.start()
        now = found.until("a", lambda now: now.state == "ready" and now.pid != a.pid, "what is wanted")
        # It is ready as soon as it runs: the shell may not have exec'ed the command yet.
        wait_until(lambda: psutil.Process(now.pid).cmdline() == ["sleep", "700"], what="what it is to be")
        assert found.ready("b").pid == b.pid


def test_systemd_is_told_of_what_was_taken_over_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet(tmp_path, shell("a", SLEEP), on_supervisor_death="survive") as found:
        found.ready("a")
        written_down(found, 1)
        killed(found)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(tmp_path / "notify"))
            listener.settimeout(30)
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
            found.start()
            assert listener.recv(4096).startswith(b"READY=1")
        monkeypatch.delenv("NOTIFY_SOCKET")


def test_a_start_that_fails_leaves_the_survivors_to_the_next(tmp_path: Path) -> None:
    with fleet(tmp_path, shell("a", SLEEP), on_supervisor_death="survive") as found:
        a = found.ready("a")
        written_down(found, 1)
        killed(found)
        good = found.plan
        plan = Path(good.run_dir) / "plan.json"
        before = plan.read_text()
        with socket.socket() as stranger:
            stranger.bind(("127.0.0.1", 0))
            stranger.listen()
            port = stranger.getsockname()[1]
            proxy = shell("proxy", SLEEP, kind="proxy", role="proxy", listen=("127.0.0.1", port))
            plan.write_text(json.dumps(replace(good, processes=(*good.processes, proxy)).to_dict()))
            found.start()
            found.process.wait(30)
            assert "cannot be bound" in found.log()
        plan.write_text(before)
        found.start()
        assert found.ready("a").pid == a.pid


def test_an_apply_is_not_crossed_by_a_start_of_what_it_stops(tmp_path: Path) -> None:
    slow = "trap 'sleep 1; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    up = Probe("log:^up", "", "", "", 0.02, 1, 20)
    with fleet(tmp_path, shell("a", slow, probe=up), shell("b", SLEEP), grace_s=20.0) as found:
        found.ready("a")
        found.ready("b")
        found.apply(replace(found.plan, processes=found.plan.processes[1:]))
        found.until("a", lambda now: now.state == "stopping", "stopping")
        for verb in ("start", "restart", "drain"):
            with pytest.raises(PdctlError, match="an apply is in progress: removing a"):
                found.ask("a", verb)
        deadline = time.monotonic() + 300
        while not has_applied(found, "done"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert [process.name for process in found.status().processes] == ["b"]


def test_probes_that_are_turned_on_while_a_process_runs(tmp_path: Path) -> None:
    hung = python("hung", SERVER)
    hung = python("hung", SERVER, ports=hung.ports, probe=http_probe(hung.ports["http"], state=True))
    with fleet(tmp_path, hung, progress_s=0.0) as found:
        before = found.ready("hung")
        supervision = replace(found.plan.supervision, progress_s=0.3)
        found.apply(replace(found.plan, supervision=supervision))
        found.again("hung", before)
        assert "hung: 1 requests are running" in found.log()


def test_a_command_that_appears_later_is_found(tmp_path: Path) -> None:
    command = tmp_path / "late"
    with fleet(tmp_path, shell("fine", SLEEP), shell("late", SLEEP)) as found:
        found.ready("fine")
        found.ready("late")
        one, two = found.plan.processes
        changed = replace(found.plan, processes=(one, replace(two, argv=(str(command),))))
        found.apply(changed)
        found.until("late", lambda now: now.state == "failed", "failed")
        assert "does not exist" in found.of("late").reason
        command.write_text("#!/bin/sh\nexec sleep 600\n")
        command.chmod(0o755)
        found.until("late", lambda _: has_applied(found, "failed"), "given up")
        found.ask("late", "start")
        found.ready("late")


def test_the_last_words_are_the_dead_ones_own(tmp_path: Path) -> None:
    """Its log has been renamed by the time its exit is reported."""
    with fleet(tmp_path, shell("a", "echo I am $PDCTL_EPOCH; exec sleep 600")) as found:
        before = found.ready("a")
        found.until("a", lambda _: "I am" in found.output("a"), "heard")
        os.kill(pid_of(before), signal.SIGKILL)
        found.again("a", before)
        assert found.exits("a")[0]["last_lines"] == [f"I am {before.epoch}"]


def found_group(found: Fleet) -> Path:
    """The service's cgroup, from one of its processes."""
    pid = found.status().processes[0].pid
    line = next(x for x in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if x.startswith("0::"))
    mounts = [words.split() for words in Path("/proc/self/mountinfo").read_text().splitlines()]
    mount = next(words[4] for words in mounts if words[words.index("-") + 1] == "cgroup2")
    return (Path(mount) / line[3:].lstrip("/")).parent


def test_a_proxy_that_could_not_be_started_is_started_later(tmp_path: Path) -> None:
    """What its clients' connections were handed to is given up with the start."""
    program, moved = tmp_path / "program", tmp_path / "moved"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    with fleet(tmp_path, child("proxy", str(program), slots=4)) as found:
        before = found.ready("proxy")
        program.rename(moved)
        os.kill(pid_of(before), signal.SIGKILL)
        failed = found.until("proxy", lambda now: now.state == "failed", "failed")
        assert "cannot be started" in (failed.reason or "")
        moved.rename(program)
        found.ask("proxy", "start")
        found.again("proxy", before)


def test_ports_are_claimed_while_their_processes_exist(tmp_path: Path) -> None:
    ours = PortClaims()
    with fleet(tmp_path, shell("a", SLEEP), shell("b", SLEEP), on_supervisor_death="survive") as found:
        ports = [spec.ports["http"] for spec in found.plan.processes]
        found.ready("a")
        found.ready("b")
        assert ours.claim(ports) == sorted(ports)
        written_down(found, 2)
        killed(found)
        found.start()
        found.until("b", lambda _: set(ports) <= claimed_ports(), "claimed again")

        third = shell("c", SLEEP)
        assert ours.claim(third.ports.values()) == []
        found.apply(replace(found.plan, processes=(*found.plan.processes, third)))
        found.until("a", lambda _: has_applied(found, "failed"), "refused")
        progress = found.status().apply
        assert progress is not None
        assert "at the same time" in progress.error
        assert [process.name for process in found.status().processes] == ["a", "b"]

        found.apply(replace(found.plan, processes=found.plan.processes[:1]))
        found.until("a", lambda _: has_applied(found, "done"), "applied")
        assert ours.claim(ports) == [ports[0]]
        assert ours.claim(ports[1:]) == []
    assert ours.claim(ports) == []
    ours.close()


def test_a_supervisor_whose_ports_are_claimed_asks_for_another_plan(tmp_path: Path) -> None:
    ours = PortClaims()
    spec = shell("a", SLEEP)
    ours.claim(spec.ports.values())
    with fleet(tmp_path, spec) as found:
        assert found.process.wait(60) == EXIT_PORTS_TAKEN
        assert f"chosen port {spec.ports['http']}" in found.log()
        assert not found.stamped()
    ours.close()


def upgraded(found: Fleet, plan: Plan, program: list[str]) -> None:
    """Have the supervisor become `program`; return when that one answers."""
    before = found.status()

    def is_another() -> bool:
        with suppress(NotRunning, NotAnswering):
            return found.status().supervisor_epoch != before.supervisor_epoch
        return False

    found.control.upgrade(program, plan)
    wait_until(is_another, what="the supervisor to become another")
    assert found.status().supervisor_pid == before.supervisor_pid


def test_a_supervisor_becomes_another_version_and_no_process_notices(tmp_path: Path) -> None:
    """Not even one that dies with its supervisor."""
    with fleet(tmp_path, shell("a", SLEEP), shell("b", SLEEP)) as found:
        a, b = found.ready("a"), found.ready("b")
        first, second = found.plan.processes
        wanted = replace(found.plan, processes=(first, replace(second, version="0.2.0")))
        upgraded(found, wanted, [sys.executable, "-m", "pdctl.supervisor"])
        found.until("b", lambda _: has_applied(found, "done"), "applied")
        assert found.ready("a").pid == a.pid
        assert found.of("a").adopted
        after = found.ready("b")
        assert after.pid != b.pid
        # They are still its children: an exit is told with its signal.
        os.kill(pid_of(a), signal.SIGKILL)
        again = found.again("a", a)
        assert last_exit_of(again).signal == "SIGKILL"
        assert {event["event"] for event in found.events()} >= {"upgrade", "adopted"}


@pytest.mark.parametrize("program", [["/none/python", "-m", "pdctl.supervisor"], ["python"], []])
def test_a_version_that_cannot_be_executed_is_refused(tmp_path: Path, program: list[str]) -> None:
    with fleet(tmp_path, shell("a", SLEEP)) as found:
        a = found.ready("a")
        with pytest.raises(PdctlError, match="cannot be executed"):
            found.control.upgrade(program, found.plan)
        assert found.ready("a").pid == a.pid


def as_program(path: Path, *lines: str) -> list[str]:
    """A supervisor that passes its trial, and does this when it is to begin."""
    path.write_text("\n".join([f"#!{sys.executable}", *PASSES_ITS_TRIAL, *lines]) + "\n")
    path.chmod(0o755)
    return [str(path)]


PASSES_ITS_TRIAL = (
    "import os, sys, time",
    "if '--try' in sys.argv: os.execv(sys.executable, [sys.executable, '-m', 'pdctl.supervisor', '--try'])",
)


@pytest.mark.parametrize("survives", [False, True])
def test_a_version_that_cannot_go_on_is_refused_before_anything_ends(tmp_path: Path, survives: bool) -> None:
    """It reads what it would be given: what runs, and the plan."""
    program = [sys.executable, "-m", "pdctl.supervisor"]
    end = "survive" if survives else "terminate"
    with fleet(tmp_path, shell("a", SLEEP), on_supervisor_death=end) as found:
        a, epoch = found.ready("a"), found.status().supervisor_epoch
        with pytest.raises(PdctlError, match="does not start: exit code"):
            found.control.upgrade([shutil.which("false") or "/bin/false"], found.plan)
        order = msgspec.json.encode({"program": program, "plan": {"of": "the future"}})
        with pytest.raises(PdctlError, match="does not start: error: the plan is of another version"):
            found.control._do("/v1/upgrade", order, within_s=client._UPGRADE_S)
        assert (found.ready("a").pid, found.status().supervisor_epoch) == (a.pid, epoch)
        upgraded(found, found.plan, program)  # one that can is not refused afterwards
        assert found.ready("a").pid == a.pid


def test_what_the_next_version_would_start_again_is_started_first(tmp_path: Path) -> None:
    with fleet(tmp_path, shell("a", SLEEP), shell("b", SLEEP)) as found:
        found.ready("b")
        found.control.act("b", "stop")
        found.until("b", lambda process: process.state == "stopped", "stopped")
        with pytest.raises(PdctlError, match="b is stopped: start it first"):
            found.control.upgrade([sys.executable, "-m", "pdctl.supervisor"], found.plan)
        found.control.act("b", "start")
        found.ready("b")
        upgraded(found, found.plan, [sys.executable, "-m", "pdctl.supervisor"])


def test_nothing_begins_during_an_upgrade_and_a_stop_ends_it(tmp_path: Path) -> None:
    """A stop in the last moment before the supervisor becomes another was lost with it."""
    tried, go_on = tmp_path / "tried", tmp_path / "go_on"
    program = tmp_path / "slow"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nopen({str(tried)!r}, 'w').close()\n"
        f"while not os.path.exists({str(go_on)!r}): time.sleep(0.01)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'pdctl.supervisor', *sys.argv[1:]])\n"
    )
    program.chmod(0o755)
    with fleet(tmp_path, shell("a", SLEEP)) as found, ThreadPoolExecutor(1) as others:
        found.ready("a")
        asked = others.submit(found.control.upgrade, [str(program)], found.plan)
        wait_until(tried.exists, what="the trial to begin")
        during = "an upgrade is in progress"
        with pytest.raises(PdctlError, match=during):
            found.control.apply(found.plan)
        with pytest.raises(PdctlError, match=during):
            found.control.act("a", "restart")
        with pytest.raises(PdctlError, match=during):
            found.control.upgrade([str(program)], found.plan)
        found.control.stop()
        go_on.touch()
        with suppress(PdctlError):  # refused, or the supervisor has ended
            asked.result(60)
        assert found.process.wait(120) == 0
        assert "upgrade" not in [event["event"] for event in found.events()]


def test_a_version_that_fails_at_once_leaves_the_processes_to_the_next(tmp_path: Path) -> None:
    """The supervisor's end is told to processes that die with it."""
    with fleet(tmp_path, shell("a", SLEEP), on_supervisor_death="survive") as found:
        a = found.ready("a")
        found.control.upgrade(as_program(tmp_path / "fails", "sys.exit(1)"), found.plan)
        assert found.process.wait(60) == 1
        found.start()
        assert found.ready("a").pid == a.pid


def test_a_stop_in_the_middle_of_an_upgrade_is_a_stop(tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    slow = as_program(
        tmp_path / "slow",
        f"open({str(reached)!r}, 'w').close()",
        "time.sleep(1)",
        "os.execv(sys.executable, [sys.executable, '-m', 'pdctl.supervisor', *sys.argv[1:]])",
    )
    with fleet(tmp_path, shell("a", SLEEP)) as found:
        a = found.ready("a")
        found.control.upgrade(slow, found.plan)
        wait_until(reached.exists, what="the next version to begin")
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(120) == 0
        assert not psutil.pid_exists(pid_of(a))
        assert "stopped" in [event["event"] for event in found.events() if event["process"] == "a"]
