"""Real etcd members, one in each of some hosts."""

from __future__ import annotations

import base64
import contextlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.hosts.lab import Host, Lab
from tests.registry.etcd import command, leads, post, until_ready
from tests.service import wait_until

CLIENT_PORT, PEER_PORT = 2379, 2380
# Services with engines run beside them: an election takes a second, as by default.
_PACE = ("--heartbeat-interval", "100", "--election-timeout", "1000")


def client_url(host: Host) -> str:
    """Where the member in a host answers."""
    return f"http://{host.address}:{CLIENT_PORT}"


class Member:
    """One etcd process. Its data outlives the power of its host."""

    def __init__(self, lab: Lab, host: Host, cluster: str) -> None:
        self.url = client_url(host)
        self.host = host
        self._lab = lab
        self._argv = command(host.name, host.folder, self.url, _peer_url(host), cluster, _PACE)
        self.start()

    def start(self) -> None:
        """Start it, also again."""
        self.process = self.host.start(self._argv, self.host.folder / "etcd.log")

    def kill(self) -> None:
        """End it now."""
        self.process.kill()

    def freeze(self) -> None:
        """Stop it. Its connections stay."""
        self.process.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue after a freeze."""
        self.process.signal(signal.SIGCONT)

    def be_back(self) -> None:
        """Run again, whatever a check has done to it."""
        if self.process.is_running:
            self.thaw()
        else:
            self.start()

    def until_ready(self) -> None:
        """Until it answers, which it does with a majority only."""
        self._lab.ask(until_ready, self.url)

    def leads(self) -> bool:
        """Whether it leads the others, as far as it knows; one that does not answer does not."""
        with contextlib.suppress(OSError):
            return self._lab.ask(leads, self.url)
        return False

    def revision(self) -> int:
        """The number of writes so far."""
        found = self._lab.ask(post, self.url, "/v3/kv/range", {"key": "AA=="})["header"]
        assert isinstance(found, dict)
        return int(found["revision"])

    def keys(self, prefix: str, alone: bool = False) -> dict[str, bytes]:
        """All keys under a prefix, with their values; `alone`: as this member has them, without asking the others."""
        first = prefix.encode()
        last = first[:-1] + bytes([first[-1] + 1])
        words = {"key": _encoded(first), "range_end": _encoded(last), "serializable": alone}
        found = self._lab.ask(post, self.url, "/v3/kv/range", words).get("kvs", [])
        assert isinstance(found, list)
        decoded = [(base64.b64decode(kv["key"]).decode(), base64.b64decode(kv.get("value", ""))) for kv in found]
        return dict(decoded)


@contextmanager
def members(lab: Lab, *names: str) -> Iterator[list[Member]]:
    """A member in each of these hosts; all answer."""
    hosts = [lab[name] for name in names]
    cluster = ",".join(f"{host.name}={_peer_url(host)}" for host in hosts)
    started = [Member(lab, host, cluster) for host in hosts]
    try:
        for member in started:
            member.until_ready()
        yield started
    finally:
        for member in started:
            member.kill()


def leader(started: list[Member]) -> Member:
    """The member that leads, when there is one."""
    found = wait_until(lambda: [member for member in started if member.leads()][:1], what="a leader")
    assert isinstance(found[0], Member)
    return found[0]


def _peer_url(host: Host) -> str:
    return f"http://{host.address}:{PEER_PORT}"


def _encoded(key: bytes) -> str:
    return base64.b64encode(key).decode()
