"""Checks of ports and addresses: who holds them, who else may take them, and whether peers can use them."""

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
# uvicorn and our sockets ask for 2,048; the kernel cuts it to this.
_GOOD_BACKLOG = 1024


def _connects(host: str, port: int) -> str:
    """ "" when somebody answers there, else why not."""
    why = "its name is not known, or no name server answers"
    for address in addresses(host):
        try:
            socket.create_connection((address, port), timeout=_CONNECT_S).close()
        except (OSError, ValueError) as failure:
            why = getattr(failure, "strerror", "") or str(failure) or type(failure).__name__
        else:
            return ""
    return why


def _is_here(name: str) -> bool:
    """Whether a host name or address means this machine; so does a name that leads nowhere: that is another fault."""
    return name in LOOPBACK or name == socket.gethostname() or all(map(is_local, addresses(name)))


@dataclass(frozen=True, slots=True)
class NetFacts:
    """`is_running`: the topology's service is up, and holds its own ports; `connects` can be planted."""

    topology: Topology | None
    host: Host
    env: dict[str, str] = field(default_factory=dict, hash=False)
    is_running: bool = False
    proc_root: Path = Path("/proc")
    connects: Callable[[str, int], str] = _connects
    is_here: Callable[[str], bool] = _is_here

    def attached(self) -> list[EngineGroup]:
        """Engines that are used by address."""
        return [group for group in self.topology.engines if group.is_attached] if self.topology else []

    def ports(self) -> dict[int, str]:
        """The ports that a topology names, and what for."""
        if self.topology is None:
            return {}
        first_last = self.topology.transfer.ports
        spread = range(first_last[0], first_last[-1] + 1) if first_last else range(0)
        return dict.fromkeys(spread, "transfer.ports") | {self.topology.proxy.port: "proxy.port"}


def check(facts: NetFacts) -> list[Finding]:
    """All checks."""
    found = [finding for one in CHECKS for finding in one(facts)]
    return found or [Finding("net.ports", Severity.OK, "net", "ports and addresses are free and reachable")]


def held(facts: NetFacts) -> Iterator[Finding]:
    """The proxy's port, when somebody else listens on it; a range for transfers, when little of it is left."""
    if facts.topology is None or facts.is_running:
        return
    port = facts.topology.proxy.port
    if holder := facts.host.listening.get(port):
        fix = f"kill {holder.pid}" if holder.pid else "end it as its owner"
        yield Finding(
            "net.ports", Severity.CRITICAL, f"proxy.port {port}", f"held by {holder.describe()}", "free",
            "/proc/net/tcp", "the proxy cannot start", f"{fix}, or choose another proxy.port",
        )  # fmt: skip
    spread = [port for port, key in facts.ports().items() if key == "transfer.ports"]
    taken = [port for port in spread if port in facts.host.listening]
    if 2 * len(taken) > len(spread):
        yield Finding(
            "net.ports", Severity.WARNING, "transfer.ports", f"{len(taken)} of {len(spread)} are taken",
            "most of them free", "/proc/net/tcp", "mooncake takes several for each engine", "another range",
        )  # fmt: skip


def clashes(facts: NetFacts) -> Iterator[Finding]:
    """One port for two purposes."""
    topology = facts.topology
    if topology is None:
        return
    ports = topology.transfer.ports
    if ports and ports[0] <= topology.proxy.port <= ports[-1]:
        yield Finding(
            "net.clash", Severity.WARNING, f"proxy.port {topology.proxy.port}",
            f"lies within transfer.ports {ports[0]} to {ports[-1]}", "outside", "the topology",
            "an engine takes another one of its range", f"port = {ports[-1] + 1} under [proxy]",
        )  # fmt: skip


def ephemeral(facts: NetFacts) -> Iterator[Finding]:
    """Ports that the kernel gives to outgoing connections: one of these may hold ours when we restart."""
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
            "an outgoing connection may have it when a process wants to listen",
            f"sysctl net.ipv4.ip_local_reserved_ports={wanted}",
        )  # fmt: skip


def backlog(facts: NetFacts) -> Iterator[Finding]:
    """Connections that wait to be accepted: a restart of the proxy relies on them."""
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
    """Engines elsewhere cannot read KV from an address that means themselves."""
    groups = facts.topology.engines if facts.topology else ()
    started = [group for group in groups if not group.is_attached]
    for far in facts.attached():
        peers = [group for group in started if group.kind == far.kind and _pair(group, far)]
        if not peers or facts.is_here(_host_of(far).strip("[]")):
            continue
        # Where another pair is left, hand-overs to this one fail and are done again there.
        others = [(a, b) for a in groups for b in groups if a.kind == b.kind and far not in (a, b) and _pair(a, b)]
        yield Finding(
            "net.loopback", Severity.WARNING if others else Severity.CRITICAL, far.name,
            f"{far.url} is elsewhere, and {peers[0].name} listens on 127.0.0.1",
            "engines that hand over to each other reach each other", "[[engines]] url",
            "it would read KV from 127.0.0.1, which there is itself: every hand-over to it fails",
            "attach engines of both roles there, or start all of them here",
        )  # fmt: skip


def _pair(one: EngineGroup, other: EngineGroup) -> bool:
    """Whether one of them prefills and the other decodes."""
    roles = {one.role, other.role}
    return Role.HYBRID in roles or roles == {Role.PREFILL, Role.DECODE}


def attached(facts: NetFacts) -> Iterator[Finding]:
    """Engines that are used by address, and that nobody answers for."""
    for group in facts.attached():
        host, port = _host_of(group).strip("[]"), int(group.url.rpartition(":")[2])
        why = facts.connects(host, port)
        if why:
            yield Finding(
                "net.attached", Severity.WARNING, group.name, f"nobody answers at {group.url}: {why}",
                "a running engine", "connect(2)", "requests will not be sent to it until it does",
                "start it, or correct its url; a firewall may be between",
            )  # fmt: skip


def proxies(facts: NetFacts) -> Iterator[Finding]:
    """HTTP proxies between our own processes (Mooncake guide: unset them)."""
    hosts = ["127.0.0.1", *dict.fromkeys(_host_of(group) for group in facts.attached())]
    names = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if facts.env.get(name)]
    bypass = facts.env.get("no_proxy", "") or facts.env.get("NO_PROXY", "")
    known = {word.strip() for word in bypass.split(",")}
    for name in names:
        missing = [host for host in hosts if host not in known and "*" not in known]
        if missing:
            yield Finding(
                "env.proxy", Severity.WARNING, name, f"{name} is set, and no_proxy lacks {', '.join(missing)}",
                "our own hosts in no_proxy", "environment", "engines' calls to each other go to a proxy",
                f"export no_proxy={','.join([*filter(None, [bypass]), *missing])}",
            )  # fmt: skip


def _host_of(group: EngineGroup) -> str:
    return group.url.removeprefix("http://").rpartition(":")[0]


def _ranges(ports: list[int]) -> list[str]:
    """Ascending numbers as the kernel's list writes them: 5000, 5002-5009."""
    found: list[list[int]] = []
    for port in ports:
        if found and found[-1][1] == port - 1:
            found[-1][1] = port
        else:
            found.append([port, port])
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]


def _covers(reserved: str, port: int) -> bool:
    """The kernel's port list format: 1024,5000-5010."""
    for part in filter(None, reserved.split(",")):
        first, _, last = part.partition("-")
        if int(first) <= port <= int(last or first):
            return True
    return False


CHECKS: tuple[Callable[[NetFacts], Iterator[Finding]], ...] = (
    held, clashes, ephemeral, backlog, loopback, attached, proxies,
)  # fmt: skip
