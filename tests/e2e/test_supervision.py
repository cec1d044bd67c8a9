"""Restarts, drains, scaling, apply, and the supervisor's death under load: no client notices any of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.service import CLI, Run, Service, free_port, last_exit_of, pid_of, running, single, topology, wait_until

pytestmark = pytest.mark.e2e

PROMPTS = [f"Chapter {n}. It was a bright cold day in April, and the clocks were striking. " * 3 for n in range(4)]
TOKENS = 60


class Load:
    """Clients with one connection per request that compare every answer with that of a run without faults."""

    def __init__(self, url: str, quiet: list[list[int]], clients: int = 2) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self._url, self._quiet = url, quiet
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self._ending.is_set():
            number += 1
            which = number % len(PROMPTS)
            try:
                answer = httpx.post(f"{self._url}/v1/completions", json=body(which), timeout=300, trust_env=False)
                if answer.status_code != 200:
                    self.failures.append(f"{answer.status_code}: {answer.text[:300]}")
                elif answer.json()["choices"][0]["token_ids"] != self._quiet[which]:
                    self.failures.append("another answer than in quiet")
                else:
                    self.answers += 1
            except httpx.HTTPError as failure:
                self.failures.append(repr(failure))
            # Without a pause, two engines use both cores of a small machine, and another one takes a minute to start.
            self._ending.wait(0.2)

    def more(self, count: int = 5) -> None:
        """Return when this many more requests have been answered."""
        reached = self.answers + count
        wait_until(lambda: self.answers >= reached or self.failures, 120, f"{count} more answers")

    def end(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(120)
        assert not self.failures, self.failures[:5]


def body(which: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[which], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip


@contextmanager
def load(service: Service) -> Iterator[Load]:
    quiet = [service.complete(PROMPTS[n], max_tokens=TOKENS, ignore_eos=True)["token_ids"] for n in range(4)]
    found = Load(service.url, quiet)
    try:
        found.more()
        yield found
        found.more()
    finally:
        found.end()


def two_of_each(**more: Any) -> str:
    return topology(prefills=2, decodes=2, kv_cache_gb=0.1, **more)


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, two_of_each()) as found:
        yield found


def pids(service: Service) -> dict[str, int | None]:
    return {process.name: process.pid for process in service.status().processes}


# -- the proxy's socket ------------------------------------------------------------------------------------


def test_four_kills_of_the_proxy_refuse_nobody(service: Service) -> None:
    """Requests without keep-alive: none is refused. Those in a proxy that dies are cut, and this is reported."""
    refused: list[str] = []
    done = cut = 0
    ending = threading.Event()

    def ask() -> None:
        nonlocal done, cut
        while not ending.is_set():
            try:
                httpx.get(f"{service.url}/v1/models", timeout=300, trust_env=False).raise_for_status()
                done += 1
            except httpx.ConnectError as failure:
                refused.append(repr(failure))
            except httpx.HTTPError:
                cut += 1

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        reached = done + 25
        wait_until(lambda reached=reached: done >= reached or refused, what="requests between the kills")
        before = service.process("proxy")
        os.kill(pid_of(before), signal.SIGKILL)
        service.restarted(before)
    ending.set()
    for thread in threads:
        thread.join(60)
    assert not refused
    # At most the requests in progress at the kill: one per client.
    assert cut <= 16


# -- verbs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("restart", "decode-0", "--drain"),
        pytest.param(("restart", "decode", "--drain"), marks=pytest.mark.slow),
    ],
)
def test_restart_with_a_drain_under_load(service: Service, words: tuple[str, ...]) -> None:
    before = pids(service)
    with load(service):
        done = service.run.cli(*words, check=True)
    assert "decode-0 is ready again" in done.stdout
    after = pids(service)
    touched = {name for name in before if before[name] != after[name]}
    assert touched == ({"decode-0"} if words[1] == "decode-0" else {"decode-0", "decode-1"})
    assert last_exit_of(service.process("decode-0")).reason == "stopped by pdctl"


@pytest.mark.slow
def test_restart_without_a_drain_under_load(service: Service) -> None:
    with load(service):
        service.run.cli("restart", "prefill-1", check=True)
        service.run.cli("restart", "decode-1", check=True)


def test_drain_sends_nothing_new_and_start_takes_it_back(service: Service) -> None:
    with load(service) as clients:
        service.run.cli("drain", "decode-1", check=True)
        assert service.process("decode-1").state == "drained"
        assert service.status().state == "degraded"
        before = service.engine_state("decode-1")["tokens_total"]
        clients.more(8)
        assert service.engine_state("decode-1")["tokens_total"] == before
        service.run.cli("start", "decode-1", check=True)
        service.wait(lambda: service.engine_state("decode-1")["tokens_total"] > before, what="work for decode-1")


def test_a_drain_waits_for_what_cannot_move(service: Service) -> None:
    """No other engine runs. On a busy machine a stream may end before the drain begins; then another one is tried."""
    others = ("prefill-0", "prefill-1", "decode-1")
    for name in others:
        service.run.cli("stop", name, check=True)
    try:
        assert any(_drained_while_streaming(service) for _ in range(5)), "every stream was over before the drain began"
    finally:
        for name in others:
            service.run.cli("start", name, check=True)
    service.healthy()


def _drained_while_streaming(service: Service) -> bool:
    """Whether a drain began during a stream; if so, it has waited for the stream's end."""
    wanted = {**body(0), "max_tokens": 1800, "ignore_eos": True, "stream": True}
    with service.client.stream("POST", "/v1/completions", json=wanted) as answer:
        lines = answer.iter_lines()
        next(lines)
        busy = "decode-0"
        drain = subprocess.Popen(
            [*CLI, "drain", busy], env=service.run.env, cwd=service.run.folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        state = service.wait(lambda: (now := service.process(busy).state) in ("draining", "drained") and now)
        began_in_time: bool = state == "draining" and service.engine_state(busy)["running"] > 0
        ended_early = began_in_time and drain.poll() is not None and service.engine_state(busy)["running"] > 0
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert not ended_early, "the drain was over while the stream ran"
    assert drain.wait(60) == 0
    service.run.cli("start", busy, check=True)
    return began_in_time


@pytest.mark.slow
def test_stop_and_start_under_load(service: Service) -> None:
    with load(service) as clients:
        service.run.cli("stop", "prefill-0", "--drain", check=True)
        assert service.process("prefill-0").state == "stopped"
        assert service.process("prefill-0").pid is None
        clients.more(5)
        service.run.cli("start", "prefill-0", check=True)
    service.healthy()


def test_scale_under_load(service: Service) -> None:
    before = pids(service)
    with load(service) as clients:
        shown = service.run.cli("scale", "decode=3", "--dry-run", check=True).stdout
        assert "+ decode-2: added" in shown
        assert pids(service) == before
        service.run.cli("scale", "decode=3", check=True)
        service.wait(lambda: service.engine_state("decode-2")["tokens_total"] > 0, what="work for decode-2")
        clients.more()
        service.run.cli("scale", "decode=2", check=True)
    assert pids(service) == before
    assert not [link for link in service.status().links if "decode-2" in (link.reader, link.peer)]


def test_apply_under_load_touches_only_what_changed(service: Service) -> None:
    """One engine added, one changed, one removed, a proxy option changed."""
    path = service.run.folder / "pdctl.toml"
    old = path.read_text()
    head, first, second = old.split("[[engines]]")
    changed = second.replace("max_num_seqs = 32", "max_num_seqs = 24").replace('name = "decode"', 'name = "late"')
    new = head.replace("[transfer]", 'routing = "round_robin"\n[transfer]')
    new += "[[engines]]" + first.replace("replicas = 2", "replicas = 1").replace(
        "max_num_seqs = 32", "max_num_seqs = 20"
    )
    new += "[[engines]]" + second + "[[engines]]" + changed.replace("replicas = 2", "replicas = 1")
    before = pids(service)
    with load(service) as clients:
        path.write_text(new)
        shown = json.loads(service.run.cli("apply", "--dry-run", "--json", check=True).stdout)
        assert shown["added"] == ["late-0"]
        assert shown["removed"] == ["prefill-1"]
        assert list(shown["restarted"]) == ["prefill-0"]
        assert shown["live"] == {"proxy": "routing changed"}
        assert shown["unchanged"] == ["decode-0", "decode-1"]
        assert pids(service) == before
        service.run.cli("apply", check=True)
        clients.more(8)
        after = pids(service)
        assert set(after) == {"prefill-0", "decode-0", "decode-1", "late-0", "proxy"}
        assert {name for name in after if before.get(name) == after[name]} == {"decode-0", "decode-1", "proxy"}
        assert "nothing" not in service.run.cli("apply", check=True).stdout
        assert pids(service) == after, "applied twice is applied once"
        path.write_text(old)
        service.run.cli("apply", check=True)
    assert set(pids(service)) == set(before)
    service.healthy()
    service.idle()


def test_settings_that_need_another_proxy_process(service: Service) -> None:
    path = service.run.folder / "pdctl.toml"
    old, before = path.read_text(), pids(service)
    with load(service) as clients:
        path.write_text(old.replace("[transfer]", 'cors_origins = ["http://example.com"]\n[transfer]'))
        shown = service.run.cli("apply", check=True).stdout
        assert "~ proxy: restarted (cors_origins changed)" in shown
        clients.more()
        path.write_text(old.replace("[transfer]", "workers = 2\n[transfer]"))
        service.run.cli("apply", check=True)
        assert set(pids(service)) == {*before, "proxy-0", "proxy-1"} - {"proxy"}
        clients.more()
        path.write_text(old)
        service.run.cli("apply", check=True)
    after = pids(service)
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} == {"proxy"}


def test_a_request_that_crosses_the_proxys_end_is_answered(service: Service) -> None:
    """An open connection, and a request that is sent just as the proxy is told to stop."""
    import socket
    from http.client import HTTPConnection

    port = int(service.url.rpartition(":")[2])
    before = pid_of(service.process("proxy"))
    data = json.dumps(body(0)).encode()
    with socket.create_connection(("127.0.0.1", port)) as fresh, closing(HTTPConnection("127.0.0.1", port)) as kept:
        # Connections are accepted in order: when one is answered, none before it is waiting.
        kept.request("GET", "/health")
        assert kept.getresponse().read()
        os.kill(before, signal.SIGTERM)
        assert kept.sock.recv(1) == b"", "an idle one is closed soon: the proxy is ending"
        fresh.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        fresh.settimeout(60)
        answer = b""
        while part := fresh.recv(65536):
            answer += part
        assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
        assert b"connection: close" in answer.lower()
    service.wait(lambda: service.process("proxy").pid not in (None, before), what="another proxy")
    service.healthy()


def test_a_port_that_is_taken_changes_nothing(service: Service) -> None:
    import socket

    path = service.run.folder / "pdctl.toml"
    old, before = path.read_text(), pids(service)
    port = service.url.rpartition(":")[2]
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        taken = stranger.getsockname()[1]
        try:
            path.write_text(old.replace(f"port = {port}", f"port = {taken}"))
            done = service.run.cli("apply")
        finally:
            path.write_text(old)
    assert done.returncode == 1
    assert f"port {taken} on 127.0.0.1 cannot be bound" in done.stderr
    assert pids(service) == before
    assert service.complete("x", max_tokens=2)


def test_a_half_valid_file_changes_nothing(service: Service) -> None:
    path = service.run.folder / "pdctl.toml"
    old, before = path.read_text(), pids(service)
    try:
        path.write_text(old.replace("max_num_seqs = 32", "max_num_sequences = 32", 1))
        done = service.run.cli("apply")
        assert done.returncode == 1
        assert "unknown key 'max_num_sequences'" in done.stderr
        assert "did you mean 'max_num_seqs'?" in done.stderr
    finally:
        path.write_text(old)
    assert pids(service) == before


def test_an_added_engine_that_cannot_start_leaves_the_rest_alone(service: Service) -> None:
    path = service.run.folder / "pdctl.toml"
    old, before = path.read_text(), pids(service)
    bad = '[[engines]]\nname = "bad"\nrole = "decode"\nkv_cache_gb = 0.1\nenv = { PYTHONHOME = "/nowhere" }\n'
    try:
        path.write_text(old.replace("grace_s = 10", "grace_s = 10\nmax_restarts = 1") + bad)
        done = service.run.cli("apply")
        assert done.returncode == 1
        assert "not applied: bad-0 exited with code" in done.stderr
    finally:
        path.write_text(old)
    assert {name: pid for name, pid in pids(service).items() if name != "bad-0"} == before
    # Applied again without it, the failed process is removed.
    service.run.cli("apply", check=True)
    assert pids(service) == before


# -- what people are told ----------------------------------------------------------------------------------


def test_why_and_events_tell_what_happened(service: Service) -> None:
    before = service.process("decode-0")
    os.kill(pid_of(before), signal.SIGKILL)
    service.restarted(before)
    told = json.loads(service.run.cli("why", "decode-0", "-n", "1", "--json", check=True).stdout)[0]
    assert (told["signal"], told["pid"], told["epoch"]) == ("SIGKILL", before.pid, before.epoch)
    assert told["by"] == "another process: pdctl did not send the signal"
    assert told["rusage"]["max_rss_bytes"] > 10 << 20
    assert any("ready: epoch" in line for line in told["last_lines"])
    assert "killed by SIGKILL" in service.run.cli("why", "decode-0", check=True).stdout
    events = [json.loads(line) for line in service.run.cli("events", check=True).stdout.splitlines()]
    mine = [event["event"] for event in events if event["process"] == "decode-0"][-3:]
    assert mine == ["exited", "started", "ready"]
    assert service.run.cli("events", "--since", "0s", check=True).stdout == ""
    lines = service.run.cli("logs", "decode-0", "--previous", check=True).stdout.splitlines()
    assert sum("ready: epoch" in line for line in lines) >= 2


def test_status_has_figures(service: Service) -> None:
    with load(service):
        found = {process.name: process for process in service.status().processes}
    assert found["decode-0"].cpu_percent is not None
    assert (found["decode-0"].rss_bytes or 0) > 50 << 20
    assert found["decode-0"].kv_used is not None
    assert found["proxy"].running is None
    assert sum(found[name].tokens_per_s or 0.0 for name in ("decode-0", "decode-1")) > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("restart", "nobody"), "no process 'nobody' in service 't'"),
        (("stop", "nobody"), "known: prefill-0, prefill-1, decode-0, decode-1, proxy"),
        (("drain", "nobody"), "no process 'nobody'"),
        (("start", "nobody"), "no process 'nobody'"),
        (("why", "nobody"), "no process 'nobody'"),
        (("logs", "nobody"), "no process 'nobody'"),
        (("scale", "decode"), "is not GROUP=N"),
        (("scale", "decode=0"), "is not GROUP=N with N from 1 to 256"),
        (("scale", "decode=-1"), "is not GROUP=N"),
        (("scale", "nobody=2"), "no engine group 'nobody'"),
        (("events", "--since", "yesterday-ish"), "is not a time"),
        (("restart", "decode-0", "-s", "other"), "service 'other' is not running"),
        (("apply", "-f", "/nowhere.toml"), "does not exist"),
    ],
)
def test_bad_input_is_answered_with_a_sentence(service: Service, words: tuple[str, ...], said: str) -> None:
    before = pids(service)
    done = service.run.cli(*words)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert pids(service) == before


def test_only_what_is_ready_can_be_drained(service: Service) -> None:
    service.run.cli("stop", "decode-1", check=True)
    done = service.run.cli("drain", "decode-1")
    assert done.returncode == 1
    assert "decode-1 is stopped: only a ready process can be drained" in done.stderr
    service.run.cli("start", "decode-1", check=True)


# -- our own death -----------------------------------------------------------------------------------------


def test_the_supervisors_death_is_survived_and_adoption_tells_the_truth(run: Run) -> None:
    text = topology(decodes=2, kv_cache_gb=0.1)
    text = text.replace("[supervisor]", '[supervisor]\non_supervisor_death = "survive"')
    with running(run, text) as service:
        os.kill(pid_of(service.process("decode-1")), signal.SIGKILL)
        service.wait(lambda: service.process("decode-1").restarts == 1 and service.status().state == "ready")
        before = service.status()
        with load(service) as clients:
            os.kill(before.supervisor_pid, signal.SIGKILL)
            clients.more(8)
            gone = run.cli("status")
            assert gone.returncode == 1
            assert "the supervisor of service 't' is gone" in gone.stderr
            run.cli("up", "-d", check=True)
            clients.more(8)
            after = service.status()
            for old, new in zip(before.processes, after.processes, strict=True):
                assert new.adopted
                same = attrgetter("name", "pid", "epoch", "restarts", "ready_since", "ports", "last_exit")
                assert same(new) == same(old)
            # It really supervises them: an exit is seen at once, with its code, and the process is restarted.
            os.kill(pid_of(after.processes[0]), signal.SIGKILL)
            service.wait(lambda: service.process("prefill-0").restarts == 1)
            assert last_exit_of(service.process("prefill-0")).signal == "SIGKILL"
            # The same for the next exit, and an edited file is applied during the takeover.
            service.wait(lambda: service.status().state == "ready")
            os.kill(after.supervisor_pid, signal.SIGKILL)
            wait_until(lambda: not psutil.pid_exists(after.supervisor_pid) or _is_zombie(after.supervisor_pid))
            path = run.folder / "pdctl.toml"
            path.write_text(path.read_text().replace("[transfer]", 'routing = "round_robin"\n[transfer]'))
            run.cli("up", "-d", check=True)
            service.wait(
                lambda: (now := service.status().apply) is not None and now.state == "done",
                what="the edit to be applied",
            )
        assert service.process("decode-0").pid == before.processes[1].pid
        # A proxy restarted by the new supervisor serves on the same socket.
        proxy = service.process("proxy")
        os.kill(pid_of(proxy), signal.SIGKILL)
        service.restarted(proxy)
        assert service.complete("x", max_tokens=2)


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_down_ends_what_a_killed_supervisor_left(run: Run) -> None:
    run.write(single(kv_cache_gb=0.1).replace("[supervisor]", '[supervisor]\non_supervisor_death = "survive"'))
    run.cli("up", "-d", check=True)
    service = Service(run)
    os.kill(service.status().supervisor_pid, signal.SIGKILL)
    service.client.close()
    done = run.cli("down", check=True)
    assert "the supervisor is gone; stopping its processes" in done.stderr
    assert not run.processes()
    assert not (run.folder / "r" / "t").exists()


def test_a_stale_run_directory_of_another_boot_is_no_obstacle(run: Run) -> None:
    folder = run.folder / "r" / "t"
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    (folder / "adopt.json").write_text('{"host_id": "other", "processes": []}')
    (folder / "plan.json").write_text("{}")
    (folder / "control.sock").write_text("")
    with running(run, single(kv_cache_gb=0.1)) as service:
        assert service.complete("x", max_tokens=2)


def test_a_unit_for_systemd(run: Run) -> None:
    """The printed unit is checked by systemd's own tool if installed; readiness and watchdog use a real socket."""
    import shutil
    import socket

    unit = run.cli("init", "--systemd", "pdctl.toml", check=True).stdout
    assert "Type=notify" in unit
    assert f"--file {run.folder}/pdctl.toml" in unit
    if shutil.which("systemd-analyze"):
        path = run.write(unit, "pdctl.service")
        env = {**os.environ, "XDG_RUNTIME_DIR": str(run.folder)}
        subprocess.run(["systemd-analyze", "verify", "--user", path], check=True, env=env)
    run.write(single(kv_cache_gb=0.1))
    address = str(run.folder / "notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(90)
        env = {**run.env, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000"}
        argv = [*CLI, "up"]
        out = (run.folder / "out").open("wb")
        with out, subprocess.Popen(argv, env=env, cwd=run.folder, stdout=out, stderr=out) as up:
            said = [listener.recv(4096).decode()]
            while not any("READY=1" in line for line in said):
                said.append(listener.recv(4096).decode())
            while sum("WATCHDOG=1" in line for line in said) < 3:
                said.append(listener.recv(4096).decode())
            children = psutil.Process(up.pid).children(recursive=True)
            assert not any("NOTIFY_SOCKET" in child.environ() for child in children)
            up.send_signal(signal.SIGTERM)
            while "STOPPING=1" not in said[-1]:
                said.append(listener.recv(4096).decode())
            assert up.wait(60) == 0
    assert not run.processes()


def test_a_unit_for_an_agent(run: Run) -> None:
    """Of a topology with [cluster]. The agent is ready although it has nothing to run, and its registry is away."""
    import shutil
    import socket

    cluster = f'[cluster]\netcd = ["http://127.0.0.1:{free_port()}"]\ninterface = "127.0.0.1"\nsecret_file = "secret"\n'
    run.write(single() + cluster)
    (run.folder / "secret").write_text("0123456789abcdef\n")
    (run.folder / "secret").chmod(0o600)
    unit = run.cli("init", "--systemd", "pdctl.toml", check=True).stdout
    assert f"agent --file {run.folder}/pdctl.toml" in unit
    assert {"Type=notify", "KillMode=process", "Restart=always"} <= set(unit.splitlines())
    if shutil.which("systemd-analyze"):
        path = run.write(unit, "pdctl-agent.service")
        env = {**os.environ, "XDG_RUNTIME_DIR": str(run.folder)}
        subprocess.run(["systemd-analyze", "verify", "--user", path], check=True, env=env)
    address = str(run.folder / "notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(90)
        env = {**run.env, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000"}
        out = (run.folder / "out").open("wb")
        with out, subprocess.Popen([*CLI, "agent"], env=env, cwd=run.folder, stdout=out, stderr=out) as agent:
            assert "READY=1" in listener.recv(4096).decode()
            while "WATCHDOG=1" not in listener.recv(4096).decode():
                pass
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(60) == 0


@pytest.mark.slow
def test_workers_share_one_socket_and_restart_one_by_one(run: Run) -> None:
    with running(run, topology(kv_cache_gb=0.1, extra="workers = 2")) as service:
        with load(service):
            service.run.cli("restart", "proxy", check=True)
        assert {p.name for p in service.status().processes} >= {"proxy-0", "proxy-1"}


@pytest.mark.slow
def test_two_services_of_one_name_do_not_meet(run: Run, tmp_path: Path) -> None:
    other = Run(run.folder / "o")
    other.folder.mkdir()
    with (
        running(run, topology(kv_cache_gb=0.1)) as one,
        running(other, topology(kv_cache_gb=0.1, port=free_port())) as two,
    ):
        before = pids(one)
        two.run.cli("restart", "decode", check=True)
        assert pids(one) == before


def test_another_users_service_is_left_alone(run: Run) -> None:
    if os.getuid() != 0 or not Path("/usr/bin/setpriv").exists():
        pytest.skip("needs root, to become somebody else")
    with running(run, single(kv_cache_gb=0.1)) as service:
        before = pids(service)
        argv = ["setpriv", "--reuid", "65534", "--clear-groups", *CLI]
        for words in (["status", "-s", "t"], ["down", "-s", "t"], ["restart", "hybrid", "-s", "t"]):
            done = subprocess.run(
                [*argv, *words], env=run.env, cwd="/", capture_output=True, text=True, check=False, timeout=300
            )
            assert done.returncode == 1, done.stderr
            assert "belongs to another user" in done.stderr
        assert pids(service) == before
