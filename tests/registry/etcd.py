"""Real etcd members on loopback."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.service import free_port

BINARY = shutil.which("etcd")
# An election within 0.2 s, and leases of 1 s. On a machine that is very busy, members then seem dead to each other.
QUICK = ("--heartbeat-interval", "20", "--election-timeout", "200")


def command(
    name: str, folder: Path, client: str, peer: str, cluster: str, pace: tuple[str, ...] = QUICK
) -> list[str]:
    """The command line of a member that keeps its data in `folder`."""
    assert BINARY
    return [
        BINARY, "--name", name, "--data-dir", str(folder / name), "--listen-client-urls", client,
        "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
        "--initial-cluster", cluster, "--log-outputs", "stderr", *pace,
    ]  # fmt: skip


def post(url: str, path: str, message: object) -> dict[str, object]:
    """A member's answer to a call of its gateway."""
    request = urllib.request.Request(url + path, json.dumps(message).encode())
    with urllib.request.urlopen(request, timeout=5) as answer:
        said: dict[str, object] = json.load(answer)
    return said


def leads(url: str) -> bool:
    """Whether this member leads the others."""
    said = post(url, "/v3/maintenance/status", {})
    header = said["header"]
    assert isinstance(header, dict)
    return bool(said.get("leader") == header["member_id"])


class Member:
    """One etcd process, which can be killed, frozen and started again on its data."""

    def __init__(self, name: str, folder: Path, client: str, peer: str, cluster: str) -> None:
        self.url = client
        self._log = folder / f"{name}.log"
        self._argv = command(name, folder, client, peer, cluster)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._argv, stderr=log, stdout=log)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        self.process = self._start()

    def post(self, path: str, message: object) -> dict[str, object]:
        return post(self.url, path, message)

    def leads(self) -> bool:
        return leads(self.url)


@contextmanager
def members(folder: Path, count: int) -> Iterator[list[Member]]:
    """`count` members that answer."""
    urls = [(f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}") for _ in range(count)]
    cluster = ",".join(f"m{number}={peer}" for number, (_client, peer) in enumerate(urls))
    started = [Member(f"m{number}", folder, client, peer, cluster) for number, (client, peer) in enumerate(urls)]
    try:
        for member in started:
            until_ready(member.url)
        yield started
    finally:
        for member in started:
            member.signal(signal.SIGCONT)
            member.kill()


def until_ready(url: str) -> None:
    """Until a member answers."""
    deadline = time.monotonic() + 120
    while True:
        try:
            post(url, "/v3/kv/range", {"key": "AA=="})
            return
        except urllib.error.HTTPError as refused:
            # With access control: it answers.
            if refused.code < 500:
                return
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not become ready"
            time.sleep(0.05)
