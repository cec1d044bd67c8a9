"""Checks of ports and addresses: whether they are free, stay free, and can be reached by peers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pdctl.doctor import Finding, Severity
from pdctl.host import Host
from pdctl.net.names import addresses, is_local
from pdctl.topology.spec import EngineGroup, Role, Topology

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
_CONNECT_S = 1.0
# uvicorn and pdctl request a backlog of 2,048; the kernel limits it to somaxconn.
_GOOD_BACKLOG = 1024


def _connects(host: str, port: int) -> str:
    """ "" if a connection succeeds, else the reason why not."""
    why = "the host name is unknown, or no name server answers"
    for address in addresses(host):
        try:
            socket.create_connection((address, port), timeout=_CONNECT_S).close()
        except (OSError, ValueError) as failure:
            why = getattr(failure, "strerror", "") or str(failure) or type(failure).__name__
        else:
            return ""
    return why


def _is_here(name: str) -> bool:
    """Whether a host name or address is this machine's. An unresolvable name counts as local: other checks report
    it."""
    return name in LOOPBACK or name == socket.gethostname() or all(map(is_local, addresses(name)))


@dataclass(frozen=True, slots=True)
class NetFacts:
    """Facts for network checks. `is_running`: the topology's service is up and holds its own ports. Tests replace
    `connects`."""

    topology: Topology | None
    host: Host
    env: dict[str, str] = field(default_factory=dict, hash=False)
    is_running: bool = False
    proc_root: Path = Path("/proc")
    connects: Callable[[str, int], str] = _connects
    is_here: Callable[[str], bool] = _is_here

    def attached(self) -> list[EngineGroup]:
        """Attached engine groups."""
        return [group for group in self.topology.engines if group.url] if self.topology else []

    def ports(self) -> dict[int, str]:
        """The ports in the topology, with the key that names each."""
        if self.topology is None:
            return {}
        first_last = self.topology.transfer.ports
        spread = range(first_last[0], first_last[-1] + 1) if first_last else range(0)
        return dict.fromkeys(spread, "transfer.ports") | {self.topology.proxy.port: "proxy.port"}


def check(facts: NetFacts) -> list[Finding]:
    """Run all checks."""
    found = [finding for one in CHECKS for finding in one(facts)]
    return found or [Finding("net.ports", Severity.OK, "net", "ports and addresses are free and reachable")]


def held(facts: NetFacts) -> Iterator[Finding]:
    """The proxy's port, if another process listens on it; the transfer ports, if most are in use."""
    if facts.topology is None or facts.is_running:
        return
    port = facts.topology.proxy.port
    if holder := facts.host.listening.get(port):
        fix = f"kill {holder.pid}" if holder.pid else "stop the process as its owner"
        yield Finding(
            "net.ports", Severity.CRITICAL, f"proxy.port {port}", f"held by {holder.describe()}", "free",
            "/proc/net/tcp", "the proxy cannot start", f"{fix}, or choose another proxy.port",
        )  # fmt: skip
    spread = [port for port, key in facts.ports().items() if key == "transfer.ports"]
    taken = [port for port in spread if port in facts.host.listening]
    if 2 * len(taken) > len(spread):
        yield Finding(
            "net.ports", Severity.WARNING, "transfer.ports", f"{len(taken)} of {len(spread)} are in use",
            "most of them free", "/proc/net/tcp", "mooncake needs several per engine", "choose another range",
        )  # fmt: skip


def clashes(facts: NetFacts) -> Iterator[Finding]:
    """The proxy's port inside the range of transfer ports."""
    topology = facts.topology
    if topology is None:
        return
    ports = topology.transfer.ports
    if ports and ports[0] <= topology.proxy.port <= ports[-1]:
        yield Finding(
            "net.clash", Severity.WARNING, f"proxy.port {topology.proxy.port}",
            f"is within transfer.ports {ports[0]} to {ports[-1]}", "outside", "the topology",
            "an engine may take the proxy's port", f"port = {ports[-1] + 1} under [proxy]",
        )  # fmt: skip


def ephemeral(facts: NetFacts) -> Iterator[Finding]:
    """Ports in the kernel's ephemeral range: an outgoing connection may hold one when a process wants to listen."""
    try:
        first, last = map(int, (facts.proc_root / "sys/net/ipv4/ip_local_port_range").read_text().split())
        reserved = (facts.proc_root / "sys/net/ipv4/ip_local_reserved_ports").read_text().strip()
    except (OSError, ValueError):
        return
    inside = sorted(port for port in facts.ports() if first <= port <= last and not _covers(reserved, port))
    if inside:
        shown = ", ".join(_ranges(inside))
        wanted = ",".join(filter(None, [reserved, *_ranges(inside)]))
        yield Finding(
            "net.ephemeral", Severity.WARNING, f"port {shown}",
            f"within the kernel's ephemeral range {first} to {last}",
            "outside, or reserved", "/proc/sys/net/ipv4/ip_local_port_range",
            "an outgoing connection may use the port when a process wants to listen on it",
            f"sysctl net.ipv4.ip_local_reserved_ports={wanted}",
        )  # fmt: skip


def backlog(facts: NetFacts) -> Iterator[Finding]:
    """The backlog of connections waiting to be accepted: a restart of the proxy relies on it."""
    try:
        most = int((facts.proc_root / "sys/net/core/somaxconn").read_text())
    except (OSError, ValueError):
        return
    if most < _GOOD_BACKLOG:
        yield Finding(
            "net.backlog", Severity.WARNING, "net", f"net.core.somaxconn = {most}", f"{_GOOD_BACKLOG}",
            "/proc/sys/net/core/somaxconn", "clients are refused while the proxy restarts",
            "sysctl net.core.somaxconn=4096",
        )  # fmt: skip


def loopback(facts: NetFacts) -> Iterator[Finding]:
    """Engines on other hosts that would have to read KV from 127.0.0.1, which is themselves."""
    groups = facts.topology.engines if facts.topology else ()
    started = [group for group in groups if not group.is_attached]
    for far in facts.attached():
        peers = [group for group in started if group.kind == far.kind and _pair(group, far)]
        if not peers or facts.is_here(_host_of(far).strip("[]")):
            continue
        # If another pair works, failed hand-overs to this engine are retried there.
        others = [(a, b) for a in groups for b in groups if a.kind == b.kind and far not in (a, b) and _pair(a, b)]
        yield Finding(
            "net.loopback", Severity.WARNING if others else Severity.CRITICAL, far.name,
            f"{far.url} is on another host, but {peers[0].name} listens on 127.0.0.1",
            "engines that exchange KV can reach each other", "[[engines]] url",
            "it would read KV from 127.0.0.1, which is itself: every hand-over to it fails",
            "attach engines of both roles on that host, or start all engines here",
        )  # fmt: skip


def _pair(one: EngineGroup, other: EngineGroup) -> bool:
    """Whether one of the two can prefill and the other decode."""
    roles = {one.role, other.role}
    return Role.HYBRID in roles or roles == {Role.PREFILL, Role.DECODE}


def attached(facts: NetFacts) -> Iterator[Finding]:
    """Attached engines that cannot be reached."""
    for group in facts.attached():
        host, port = _host_of(group).strip("[]"), int(group.url.rpartition(":")[2])
        why = facts.connects(host, port)
        if why:
            yield Finding(
                "net.attached", Severity.WARNING, group.name, f"cannot reach {group.url}: {why}",
                "a running engine", "connect(2)", "it gets no requests until it answers",
                "start it, correct its url, or check the firewall",
            )  # fmt: skip


def proxies(facts: NetFacts) -> Iterator[Finding]:
    """HTTP proxies between the service's own processes (Mooncake guide: unset them)."""
    hosts = ["127.0.0.1", *dict.fromkeys(_host_of(group) for group in facts.attached())]
    names = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if facts.env.get(name)]
    bypass = facts.env.get("no_proxy", "") or facts.env.get("NO_PROXY", "")
    known = {word.strip() for word in bypass.split(",")}
    for name in names:
        missing = [host for host in hosts if host not in known and "*" not in known]
        if missing:
            yield Finding(
                "env.proxy", Severity.WARNING, name, f"{name} is set, but no_proxy lacks {', '.join(missing)}",
                "the service's hosts in no_proxy", "environment", "calls between engines go through an HTTP proxy",
                f"export no_proxy={','.join([*filter(None, [bypass]), *missing])}",
            )  # fmt: skip


def _host_of(group: EngineGroup) -> str:
    return group.url.removeprefix("http://").rpartition(":")[0]


def _ranges(ports: list[int]) -> list[str]:
    """Ascending port numbers in the kernel's list format: 5000, 5002-5009."""
    found: list[list[int]] = []
    for port in ports:
        if found and found[-1][1] == port - 1:
            found[-1][1] = port
        else:
            found.append([port, port])
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]


def _covers(reserved: str, port: int) -> bool:
    """Whether a port is in a list in the kernel's format: 1024,5000-5010."""
    for part in filter(None, reserved.split(",")):
        first, _, last = part.partition("-")
        if int(first) <= port <= int(last or first):
            return True
    return False


CHECKS: tuple[Callable[[NetFacts], Iterator[Finding]], ...] = (
    held, clashes, ephemeral, backlog, loopback, attached, proxies,
)  # fmt: skip
