"""The hosts that other tests stand on: they are apart, reach each other, and their faults are what they are called."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.lab import Lab, lab, reason_to_skip
from tests.service import REPOSITORY, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())]

# Answers each datagram that it gets.
ECHO = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", 7))
print("up", flush=True)
while True:
    s.sendto(*s.recvfrom(100))
"""
# Sends ten datagrams to a host, each when the one before is back or lost.
CALL = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(0.2)
back = 0
for _ in range(int(sys.argv[2])):
    s.sendto(b"x", (sys.argv[1], 7))
    try:
        s.recv(100)
        back += 1
    except TimeoutError:
        pass
print(back)
"""


@pytest.fixture(scope="module")
def service() -> Iterator[Lab]:
    with lab("a", "b", "c") as made:
        for host in made.hosts:
            echo(made, host.name)
        yield made


def echo(hosts: Lab, name: str) -> None:
    log = hosts[name].folder / "echo.log"
    log.unlink(missing_ok=True)
    hosts[name].start([sys.executable, "-c", ECHO], log)
    wait_until(lambda: "up" in log.read_text())


def back(hosts: Lab, name: str, other: str, count: int = 10) -> int:
    """How many of ten calls from one host to another are answered."""
    return int(said(hosts, name, sys.executable, "-c", CALL, hosts[other].address, str(count)))


def said(hosts: Lab, name: str, *argv: str) -> str:
    done = hosts[name].run(list(argv))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hosts_have_names_boots_clocks_and_memories_of_their_own(service: Lab) -> None:
    assert [said(service, name, "hostname") for name in "abc"] == ["a", "b", "c"]
    assert len({said(service, name, "cat", "/proc/sys/kernel/random/boot_id") for name in "abc"}) == 3
    uptimes = [float(said(service, name, "cat", "/proc/uptime").split()[0]) for name in "abc"]
    assert uptimes[1] - uptimes[0] > 50_000 < uptimes[2] - uptimes[1]
    assert said(service, "a", "sh", "-c", "echo x >/dev/shm/x; ls /dev/shm") == "x"
    assert said(service, "b", "ls", "/dev/shm") == ""
    assert said(service, "a", "sh", "-c", "echo $PPID") == "0", "a host does not see this machine's processes"


def test_hosts_reach_each_other_by_name_and_the_test_reaches_them_all(service: Lab) -> None:
    assert said(service, "a", "getent", "hosts", "c").split() == [service["c"].address, "c"]
    assert back(service, "a", "c") == 10

    def call() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
            caller.settimeout(60)
            caller.sendto(b"hello", (service["b"].address, 7))
            return caller.recv(100)

    assert service.ask(call) == b"hello"
    assert said(service, "a", "ip", "route", "get", service["b"].address).split()[2] == "eth0"


def test_a_cut_is_silent_and_heals(service: Lab) -> None:
    service.cut("a", "b")
    assert (back(service, "a", "b", 2), back(service, "b", "a", 2)) == (0, 0)
    assert (back(service, "a", "c"), back(service, "b", "c")) == (10, 10)
    service.heal("b", "a")
    assert back(service, "a", "b") == 10
    service.cut("a")
    assert (back(service, "a", "c", 2), back(service, "b", "c")) == (0, 10)
    service.heal()
    assert back(service, "a", "c") == 10


def test_a_one_way_cut_loses_what_one_host_sends(service: Lab, tmp_path: Path) -> None:
    hear = 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("0.0.0.0", 9)); '
    hear += 'print("up", flush=True); s.settimeout(2); print(s.recv(9))'
    send = "import socket, sys; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', (sys.argv[1], 9))"
    service.cut("a", "b", oneway=True)
    for here, there, arrives in (("a", "b", False), ("b", "a", True)):
        log = tmp_path / f"{there}.log"
        hearing = service[there].start([sys.executable, "-c", hear], log)
        wait_until(lambda log=log: "up" in log.read_text())
        said(service, here, sys.executable, "-c", send, service[there].address)
        assert (hearing.wait() == 0) == arrives
    service.heal()


def test_a_cut_of_ports_loses_nothing_else(service: Lab, tmp_path: Path) -> None:
    serve = "import socket; s = [socket.create_server(('', port)) for port in (91, 92)]; print('up', flush=True); "
    serve += "import time; time.sleep(60)"
    call = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1)"
    serving = service["b"].start([sys.executable, "-c", serve], tmp_path / "log")
    wait_until(lambda: "up" in (tmp_path / "log").read_text())
    service.cut("b", ports=(91,))
    reached = {
        port: service["a"].run([sys.executable, "-c", call, service["b"].address, str(port)]).returncode == 0
        for port in (91, 92)
    }
    assert reached == {91: False, 92: True}
    service.heal()
    assert service["a"].run([sys.executable, "-c", call, service["b"].address, "91"]).returncode == 0
    serving.kill()


def test_a_part_of_what_a_host_gets_is_lost(service: Lab) -> None:
    service.loss("b", 50)
    assert 10 < back(service, "a", "b", 50) < 40
    service.loss("b", 0)
    assert back(service, "a", "b", 50) == 50


def test_a_frozen_host_answers_after_it_is_thawed(service: Lab) -> None:
    service["b"].freeze()
    assert back(service, "a", "b", 2) == 0
    service["b"].thaw()
    assert back(service, "a", "b") == 10


def test_a_host_without_power_is_silent_and_boots_anew(service: Lab) -> None:
    before = said(service, "b", "cat", "/proc/sys/kernel/random/boot_id")
    pids = service["b"].pids()
    service["b"].kill()
    assert back(service, "a", "b", 2) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    service["b"].boot()
    assert said(service, "b", "cat", "/proc/sys/kernel/random/boot_id") != before
    echo(service, "b")
    assert back(service, "a", "b") == 10


def test_a_program_is_signalled_alone(service: Lab, tmp_path: Path) -> None:
    program = service["a"].start(["sh", "-c", "echo $$; exec sleep 60"], tmp_path / "log")
    inner = wait_until(lambda: (tmp_path / "log").read_text().strip())
    assert service["a"].outer(int(inner)) == program.pid
    program.signal(signal.SIGSTOP)
    program.signal(signal.SIGCONT)
    program.signal(signal.SIGTERM)
    assert program.wait() == -signal.SIGTERM


def test_nothing_is_left_of_hosts_whose_maker_is_killed(tmp_path: Path) -> None:
    text = "import sys, time; from tests.hosts.lab import Lab; lab = Lab('a', 'b'); "
    text += "print(*lab['a'].pids(), lab._switch.pid, flush=True); time.sleep(600)"
    maker = subprocess.Popen([sys.executable, "-c", text], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert maker.stdout
    pids = maker.stdout.readline().split()
    maker.kill()
    maker.wait()
    maker.stdout.close()
    assert len(pids) > 1

    def gone() -> bool:
        return not any(os.path.exists(f"/proc/{pid.decode()}") for pid in pids)  # noqa: PTH110

    wait_until(gone, timeout=30)
    deadline = time.monotonic() + 30
    while subprocess.run(["ip", "link", "show", "br0"], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline
