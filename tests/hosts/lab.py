"""Several hosts on one machine, for tests: each is a process that holds namespaces of its own.

A host has its own network, name, process ids, mounts, shared memory, boot id and monotonic clock, and is joined to the
others by a bridge in a namespace of its own; nothing is added to the machine's network. Files are shared. When the
process that made the hosts dies, however, the kernel ends them and everything in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Found = TypeVar("Found")

_NET = "10.77.7"
# Clocks of hosts differ by this, so that code which compares them fails at once. Seconds.
_SKEW_S = 100_000
_TOOLS = {"ip": "iproute2", "nft": "nftables"} | dict.fromkeys(("nsenter", "unshare", "setpriv"), "util-linux")
_START_S = 30.0
_CLONE_NEWNET = 0x40000000
_CGROUPS = "pdctl-lab"
_NAMESPACES = ("--cgroup", "--net", "--uts", "--mount", "--pid", "--ipc", "--time")

# The first process of a host. It reaps what is left to it, as init does.
_INIT = """
set -e
dir=$1 name=$2
mount --make-rprivate /
hostname "$name"
mount -t proc proc /proc
mount --bind "$dir/boot_id" /proc/sys/kernel/random/boot_id
[ ! -e /etc/machine-id ] || mount --bind "$dir/machine-id" /etc/machine-id
mount --bind "$dir/hosts" /etc/hosts
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null || :
mount -t tmpfs -o mode=1777,size=2g shm /dev/shm
mount -t tmpfs -o mode=755 run /run
ip link set lo up
echo up
trap : TERM
while :; do sleep 3600 & wait $! || :; done
"""


def reason_to_skip() -> str:
    """Why no hosts can be made here, or ""."""
    if os.geteuid() != 0:
        return "NOT TESTED: hosts are made of namespaces by root only"
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if missing:
        return f"NOT TESTED: hosts need {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "true"], capture_output=True, text=True
    )
    return f"NOT TESTED: no hosts can be made here: {tried.stderr.strip()}" if tried.returncode else ""


class Program:
    """A program that runs in a host. `pid`: as this machine sees it."""

    def __init__(self, entered: subprocess.Popen[bytes]) -> None:
        self._entered = entered
        self.pid = _child_of(entered)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._entered.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the program alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        if number == signal.SIGCONT:
            # What entered the host stops when the program does.
            self._entered.send_signal(number)

    def wait(self, timeout: float = 60.0) -> int:
        """The exit status."""
        return self._entered.wait(timeout)

    def kill(self) -> None:
        """End it now."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self.wait()


class Host:
    """One host. `folder`: files that belong to it."""

    def __init__(self, lab: Lab, number: int, name: str) -> None:
        self.name = name
        self.address = f"{_NET}.{10 + number}"
        self.folder = lab.folder / name
        self.folder.mkdir()
        self.number = number
        self._lab = lab
        self._outer: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._entered: list[subprocess.Popen[bytes]] = []
        (self.folder / "machine-id").write_text(f"{uuid.uuid4().hex}\n")

    @property
    def skew_s(self) -> float:
        """By how much its clocks are ahead of this machine's."""
        return self.number * _SKEW_S

    @property
    def is_up(self) -> bool:
        """Whether it has power."""
        return self._outer is not None

    def boot(self) -> None:
        """Power on: a new boot id, empty shared memory, the same name and address."""
        assert not self.is_up, f"{self.name} is up"
        (self.folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        lines = [f"{host.address} {host.name}" for host in self._lab.hosts]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        skew = str(self.number * _SKEW_S)
        self._outer = subprocess.Popen(
            [
                *self._in_cgroup(), "setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES,
                "--fork", "--kill-child", "--boottime", skew, "--monotonic", skew,
                "bash", "-c", _INIT, "init", str(self.folder), self.name,
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        assert self._outer.stdout
        said = self._outer.stdout.readline()
        assert said == b"up\n", said + (self._outer.stdout.read() or b"")
        self._init = _child_of(self._outer)
        self._lab.plug(self)

    def kill(self) -> None:
        """Power off: everything in it dies at once, and its address falls silent."""
        if self._outer is None:
            return
        outer, self._outer = self._outer, None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)
        self._continue_entered()
        outer.wait()
        assert outer.stdout
        outer.stdout.close()
        for entered in self._entered:
            entered.wait()
        self._entered = []

    def freeze(self) -> None:
        """Stop every process, as if the virtual machine were paused."""
        # What begins while others are being stopped is found in the next turn.
        stopped: set[int] = set()
        while new := set(self.pids()) - stopped:
            _signal_all(new, signal.SIGSTOP)
            stopped |= new

    def thaw(self) -> None:
        """Continue after a freeze."""
        _signal_all(set(self.pids()), signal.SIGCONT)
        self._continue_entered()

    def pids(self) -> list[int]:
        """Its processes, as this machine sees them."""
        ours = _namespace(self._init)
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _namespace(int(path.name)) == ours]

    def outer(self, pid: int) -> int:
        """This machine's id of the process that the host calls `pid`."""
        for outer in self.pids():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{outer}/status").read_text()
                line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
                if int(line.split()[-1]) == pid:
                    return outer
        raise ProcessLookupError(f"{self.name} has no process {pid}")

    def start(self, argv: list[str], log: Path, env: Mapping[str, str] | None = None) -> Program:
        """Start a program in a session of its own; its output goes to `log`."""
        with log.open("ab") as output:
            entered = self._enter(["setsid", "--wait", *argv], env, output.fileno(), subprocess.STDOUT)
        return Program(entered)

    def run(
        self, argv: list[str], env: Mapping[str, str] | None = None, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Execute a program to its end."""
        entered = self._enter(argv, env, subprocess.PIPE, subprocess.PIPE)
        try:
            output, errors = entered.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _signal_all({_child_of(entered)}, signal.SIGKILL)
            entered.communicate()
            raise
        return subprocess.CompletedProcess(argv, entered.returncode, output.decode(), errors.decode())

    def _enter(
        self, argv: list[str], env: Mapping[str, str] | None, output: int, errors: int
    ) -> subprocess.Popen[bytes]:
        assert self.is_up, f"{self.name} is off"
        self._entered = [entered for entered in self._entered if entered.poll() is None]
        entering = ["nsenter", "--target", str(self._init), *_NAMESPACES, f"--wd={self.folder}", "--"]
        entered = subprocess.Popen(
            [*self._in_cgroup(), *entering, *argv],
            env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
        )  # fmt: skip
        self._entered.append(entered)
        return entered

    def _continue_entered(self) -> None:
        for entered in self._entered:
            entered.send_signal(signal.SIGCONT)

    def _in_cgroup(self) -> list[str]:
        """The beginning of a command line that joins the host's control group, if this machine has any."""
        group = self._lab.cgroup(self.name)
        return ["sh", "-c", 'echo $$ >"$0"/cgroup.procs && exec "$@"', str(group)] if group else []


class Lab:
    """Hosts of these names, all up, until `down`. `folder` holds their files and is removed."""

    def __init__(self, *names: str) -> None:
        _sweep()
        # Short: the path of a unix socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="pl-", dir="/tmp"))
        # Who sends what to whom in vain: the condition is "" for everything.
        self._cut: set[tuple[str, str, str]] = set()
        self._loss: dict[str, float] = {}
        self.hosts: list[Host] = []
        self._switch = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo up; exec sleep infinity"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._threads = ThreadPoolExecutor(16, "lab", self._join_network)
        try:
            assert self._switch.stdout
            assert self._switch.stdout.readline() == b"up\n"
            self._in_switch("ip link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0")
            self._in_switch(f"ip addr add {_NET}.1/24 dev br0")
            self._in_switch("ip link set br0 up")
            self.hosts = [Host(self, number, name) for number, name in enumerate(names, 1)]
            for host in self.hosts:
                host.boot()
        except BaseException:
            self.down()
            raise

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    def down(self) -> None:
        """End everything."""
        self._threads.shutdown(cancel_futures=True)
        for host in self.hosts:
            host.kill()
            if group := self.cgroup(host.name):
                _remove_cgroup(group)
        self._switch.kill()
        self._switch.wait()
        assert self._switch.stdout
        self._switch.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, call: Callable[Given, Found], *given: Given.args, **named: Given.kwargs) -> Found:
        """What `call` returns in a thread that is in the hosts' network, beside them: no cut concerns it."""
        return self.begin(call, *given, **named).result()

    def begin(self, call: Callable[Given, Found], *given: Given.args, **named: Given.kwargs) -> Future[Found]:
        """The same, without waiting for it."""
        return self._threads.submit(call, *given, **named)

    # -- faults --------------------------------------------------------------------------------------------

    def cut(self, name: str, other: str | None = None, oneway: bool = False, ports: tuple[int, ...] = ()) -> None:
        """Lose everything between a host and another, or all others; `oneway`: only what it sends; `ports`: only TCP to
        and from these ports. Silent, as behind a dead switch: no reset, no error."""
        listed = ", ".join(map(str, ports))
        conditions = [f"tcp dport {{ {listed} }}", f"tcp sport {{ {listed} }}"] if ports else [""]
        for peer in self._peers(name, other):
            ways = [(name, peer)] if oneway else [(name, peer), (peer, name)]
            self._cut |= {(*way, condition) for way in ways for condition in conditions}
        self._filter()

    def heal(self, name: str | None = None, other: str | None = None) -> None:
        """Undo cuts: all of them, those of a host, or those of two hosts."""
        healed = [{name, peer} for peer in self._peers(name, other)] if name else []
        self._cut = {cut for cut in self._cut if name and {cut[0], cut[1]} not in healed}
        self._filter()

    def loss(self, name: str, percent: float) -> None:
        """Lose this part of what a host gets from other hosts; 0 ends it."""
        self._loss[name] = percent
        self._filter()

    # -- parts ---------------------------------------------------------------------------------------------

    def plug(self, host: Host) -> None:
        """A cable from a host to the switch. What was there before it died is removed by the kernel, a little later."""
        port = f"p{host.number}"
        self._in_switch(f"sh -c 'ip link del {port} 2>/dev/null || :'")
        self._in_switch(f"ip link add {port} type veth peer name eth0 netns {host._init}")
        self._in_switch(f"ip link set {port} master br0 up")
        done = host.run(
            ["sh", "-c", f"ip link set eth0 address {_mac(host)} && ip addr add {host.address}/24 dev eth0 && "
             "ip link set eth0 up && ip route add default via " + f"{_NET}.1"]
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def cgroup(self, name: str) -> Path | None:
        """The control group of a host, made if needed; None where this machine has none to give."""
        root = _cgroup_root()
        if root is None:
            return None
        group = root / f"{_CGROUPS}-{os.getpid()}" / name
        try:
            group.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        return group

    def _peers(self, name: str, other: str | None) -> list[str]:
        return [other] if other else [host.name for host in self.hosts if host.name != name]

    def _filter(self) -> None:
        """Replace the switch's rules in one step. Only IP: a host that finds no neighbour's card gets an error."""
        ports = {host.name: f'"p{host.number}"' for host in self.hosts}
        rules = [f"iifname {ports[a]} oifname {ports[b]} {condition} drop" for a, b, condition in sorted(self._cut)]
        for name, percent in self._loss.items():
            rules.append(f"oifname {ports[name]} numgen random mod 1000 < {round(percent * 10)} drop")
        chain = ["type filter hook forward priority 0; policy accept", "ether type != ip accept", *rules]
        empty = ["table bridge lab", "delete table bridge lab"]
        text = "\n".join([*empty, "table bridge lab {", "chain forward {", *chain, "}", "}", ""])
        done = subprocess.run([*self._entering_switch(), "nft", "-f", "-"], input=text, text=True, capture_output=True)
        assert done.returncode == 0, f"{done.stderr}{text}"

    def _in_switch(self, command: str) -> None:
        done = subprocess.run([*self._entering_switch(), "sh", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def _entering_switch(self) -> list[str]:
        return ["nsenter", "--target", str(self._switch.pid), "--net", "--"]

    def _join_network(self) -> None:
        """Move this thread, alone of all in this process, into the hosts' network."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/proc/{self._switch.pid}/ns/net").open() as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def lab(*names: str) -> Iterator[Lab]:
    """Hosts that are gone afterwards."""
    made = Lab(*names)
    try:
        yield made
    finally:
        made.down()


def _mac(host: Host) -> str:
    return f"02:77:00:00:00:{host.number:02x}"


def _child_of(entered: subprocess.Popen[bytes]) -> int:
    """The first child; the command that was asked for, as entering a host's process ids takes a process of its own."""
    path = Path(f"/proc/{entered.pid}/task/{entered.pid}/children")
    deadline = time.monotonic() + _START_S
    while entered.poll() is None:
        if found := path.read_text().split():
            return int(found[0])
        assert time.monotonic() < deadline, f"{entered.args!r} starts nothing"
        time.sleep(0.005)
    raise AssertionError(f"{entered.args!r} ended with {entered.returncode}")


def _namespace(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def _signal_all(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _cgroup_root() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(path)
    return None


def _remove_cgroup(group: Path) -> None:
    for path in sorted([group, *group.rglob("*")], reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
    with contextlib.suppress(OSError):
        group.parent.rmdir()


def _sweep() -> None:
    """Remove empty control groups of labs whose process was killed. All else went with it."""
    root = _cgroup_root()
    for group in root.glob(f"{_CGROUPS}-*") if root is not None else ():
        if not Path(f"/proc/{group.name.rpartition('-')[2]}").exists():
            _remove_cgroup(group)
