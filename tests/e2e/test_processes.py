"""[[processes]]: any program is supervised like an engine, and one may be the engine. Real processes, no model."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.service import Run, Service, free_port, pid_of, running, temporary_run, wait_until

pytestmark = pytest.mark.e2e
WORKER = Path(__file__).parents[1] / "fakes" / "vllm_worker.py"
# Listens until SIGUSR1, then lives on without its port.
CLOSER = "; ".join(
    [
        "import signal, socket, sys",
        "port = socket.create_server(('127.0.0.1', int(sys.argv[1])))",
        "signal.signal(signal.SIGUSR1, lambda *_: port.close())",
        "[signal.pause() for _ in iter(int, 1)]",
    ]
)
HEAD = f"""
[service]
name = "t"
model = "m"
[proxy]
port = PORT
[supervisor]
grace_s = 10
stable_s = 1
liveness_s = 0.2
[[engines]]
name = "h"
role = "hybrid"
kind = "vllm"
process = "worker"
[[processes]]
name = "exporter"
command = ["{sys.executable}", "-m", "http.server", "{{port}}", "--bind", "127.0.0.1", "--directory", "/var/empty"]
ports = ["http"]
ready = "tcp"
depends_on = ["worker"]
restart_with = ["worker"]
[[processes]]
name = "closer"
command = ["{sys.executable}", "-c", "{CLOSER}", "{{port}}"]
ports = ["any"]
[[processes]]
name = "worker"
command = ["{sys.executable}", "{WORKER}", "{{port}}"]
env = {{ ADDRESS = "127.0.0.1:{{port:http}}" }}
ports = ["http"]
ready = "http:/health"
"""
# A job whose log says when it is ready; it also shows what a process inherits.
JOB = """
[[processes]]
name = "job"
command = ["sh", "-c", "env; echo ready now; exec sleep 1000"]
ready = "log:^ready now$"
"""


def topology(port: int | None = None, more: str = JOB) -> str:
    return HEAD.replace("PORT", str(port or free_port())) + more


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with temporary_run() as run, running(run, topology()) as found:
        yield found


def test_processes_are_listed_in_their_order(service: Service) -> None:
    shown = service.status().processes
    assert [(p.name, p.kind, p.role, p.state) for p in shown] == [
        ("closer", "command", "command", "ready"),
        ("worker", "command", "command", "ready"),
        ("exporter", "command", "command", "ready"),
        ("job", "command", "command", "ready"),
        ("proxy", "proxy", "proxy", "ready"),
    ]
    for verb in ("plan", "status"):
        out = service.run.cli(verb, check=True).stdout
        assert all(name in out for name in ("worker", "exporter", "job"))
    port = service.process("exporter").ports["http"]
    assert httpx.get(f"http://127.0.0.1:{port}/none", trust_env=False).status_code == 404


def test_an_engine_that_is_a_process_answers(service: Service) -> None:
    assert service.complete("hello", max_tokens=3)["text"] == " 0 1 2"
    [engine] = service.status().attached
    assert (engine.name, engine.port, engine.answers) == ("h", service.process("worker").ports["http"], True)


def test_a_process_gets_its_ports_and_no_secret(service: Service) -> None:
    worker = service.process("worker")
    env = psutil.Process(pid_of(worker)).environ()
    assert env["ADDRESS"] == f"127.0.0.1:{worker.ports['http']}"
    assert "PDCTL_SECRET" not in env
    assert "ready now" in service.run.cli("logs", "job", check=True).stdout
    headers = httpx.get(f"http://127.0.0.1:{worker.ports['http']}/stats", trust_env=False).json()["headers"]
    secret = (service.run.folder / "r" / "t" / "secret").read_text()
    assert secret not in psutil.Process(pid_of(service.process("exporter"))).environ().values()
    assert headers, "the proxy called it"


def test_a_killed_process_is_restarted_alone(service: Service) -> None:
    worker, before = service.process("worker"), service.process("exporter")
    os.kill(pid_of(before), signal.SIGKILL)
    after = service.restarted(before)
    assert (after.ports, after.restarts) == (before.ports, before.restarts + 1)
    assert service.process("worker").pid == worker.pid
    assert "SIGKILL" in service.run.cli("why", "exporter", check=True).stdout


def test_a_process_that_does_not_answer_is_replaced(service: Service) -> None:
    before = service.process("worker")
    os.kill(pid_of(before), signal.SIGSTOP)
    service.restarted(before)
    assert "not alive" in service.run.cli("events").stdout


def test_a_process_without_its_port_is_replaced(service: Service) -> None:
    before = service.process("closer")
    os.kill(pid_of(before), signal.SIGUSR1)
    assert service.restarted(before).ports == before.ports
    assert "accepts no connection" in service.run.cli("events").stdout


def test_companions_restart_with_it(service: Service) -> None:
    worker, exporter, job = (service.process(name) for name in ("worker", "exporter", "job"))
    os.kill(pid_of(worker), signal.SIGKILL)
    service.restarted(worker)
    service.restarted(exporter)
    assert service.process("job").pid == job.pid
    service.healthy()
    assert service.complete("again", max_tokens=2)["text"] == " 0 1"


def test_the_verbs_work_and_draining_is_refused(service: Service) -> None:
    before = service.process("job")
    service.run.cli("restart", "job", "--drain", check=True)
    assert service.restarted(before).epoch != before.epoch
    refused = service.run.cli("drain", "job")
    assert refused.returncode == 1
    assert "job is not an engine" in refused.stderr
    service.run.cli("stop", "job", check=True)
    assert service.process("job").state == "stopped"
    service.run.cli("start", "job", check=True)
    assert service.process("job").state == "ready"


def test_kv_and_links_ignore_processes(service: Service) -> None:
    found = json.loads(service.run.cli("kv", "--json", check=True).stdout)
    assert found == {"engines": [], "leases": [], "unreachable": {}}
    assert not service.status().links


def test_apply_adds_changes_and_removes_processes(run: Run) -> None:
    port = free_port()
    with running(run, topology(port)) as service:
        worker = service.process("worker")
        chain = """
[[processes]]
name = "after"
command = ["sh", "-c", "echo started; exec sleep 1000"]
ready = "log:started"
depends_on = ["before"]
[[processes]]
name = "before"
command = ["sh", "-c", "sleep 0.5; echo up; exec sleep 1000"]
ready = "log:up"
"""
        run.write(topology(port, JOB.replace("sleep 1000", "sleep 2000") + chain))
        run.cli("apply", check=True)
        names = [process.name for process in service.status().processes]
        assert names == ["closer", "worker", "exporter", "job", "before", "after", "proxy"]
        assert "sleep 2000" in " ".join(psutil.Process(pid_of(service.process("job"))).cmdline())
        assert service.process("worker").pid == worker.pid
        moments = {
            (event["process"], event["event"]): number
            for number, event in enumerate(map(json.loads, run.cli("events", check=True).stdout.splitlines()))
        }
        assert moments["before", "ready"] < moments["after", "started"]
        run.write(topology(port, ""))
        run.cli("apply", check=True)
        assert [process.name for process in service.status().processes] == ["closer", "worker", "exporter", "proxy"]
        assert service.complete("hello", max_tokens=1)["text"] == " 0"


def test_a_process_that_cannot_start_ends_the_start(run: Run) -> None:
    broken = '[[processes]]\nname = "broken"\ncommand = ["sh", "-c", "echo no licence >&2; exit 3"]\nready = "log:up"\n'
    run.write(topology(more=broken).replace("stable_s = 1", "stable_s = 1\nmax_restarts = 0"))
    done = run.cli("up", "-d")
    assert done.returncode != 0
    assert "broken" in done.stderr
    assert "no licence" in done.stderr


def test_what_the_plan_refuses_has_a_line_and_a_hint(run: Run) -> None:
    run.write(topology(more='[[processes]]\nname = "x"\ncommand = ["no-such-program"]\ndepends_on = ["nobody"]\n'))
    done = run.cli("plan")
    assert done.returncode == 1
    assert "processes[3].command: no-such-program does not exist" in done.stderr
    assert "processes[3].depends_on: 'nobody' is not another group, process or store" in done.stderr
    assert "to choose from: exporter, closer, worker" in done.stderr


def test_processes_survive_the_supervisor(run: Run) -> None:
    text = topology().replace("[supervisor]", '[supervisor]\non_supervisor_death = "survive"')
    with running(run, text) as service:
        before = {process.name: process.pid for process in service.status().processes}
        os.kill(service.status().supervisor_pid, signal.SIGKILL)
        run.cli("up", "-d", check=True)

        def adopted() -> bool:
            found = service.status()
            return found.state == "ready" and all(process.adopted for process in found.processes)

        wait_until(adopted, what="a takeover")
        assert {process.name: process.pid for process in service.status().processes} == before
