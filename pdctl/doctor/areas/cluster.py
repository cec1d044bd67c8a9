"""Checks of a service on several machines, as far as one machine shows them: what it exposes, and whether etcd
answers."""

from __future__ import annotations

import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pdctl.doctor import Finding, Severity
from pdctl.errors import PdctlError
from pdctl.host.processes.ports import Listener
from pdctl.net.identity import identity_in
from pdctl.topology.spec import Cluster, Topology
from pdctl.transports import TRANSPORTS

ANY_ADDRESS = ("0.0.0.0", "::")
_OLDEST, _NEWEST = (3, 4), (3, 7)
_ANSWER_S = 2.0
# Of a certificate's life, what may be left before somebody should have renewed it.
_RENEWED_BY = 0.25


class _Version(msgspec.Struct, frozen=True):
    """What a member answers at /version."""

    etcdserver: str


def ask_etcd(url: str) -> tuple[str, str]:
    """The version of a member; or "" and why it does not answer."""
    # As the agents ask: not through an HTTP proxy of the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}/version", timeout=_ANSWER_S) as answer:
            return msgspec.json.decode(answer.read(4096), type=_Version).etcdserver, ""
    except urllib.error.HTTPError as failure:
        return "", f"it answers with status {failure.code}"
    except urllib.error.URLError as failure:
        if isinstance(failure.reason, ssl.SSLError):
            # It is there: who it believes, and who believes it, the agent's own client finds out.
            return "?", ""
        return "", str(failure.reason)
    except (OSError, msgspec.DecodeError) as failure:
        return "", str(failure) or type(failure).__name__


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """Facts for these checks. `listeners`: of the service's processes on this machine; `ours`: the ports that pdctl
    opens itself, with their purpose: others are opened by libraries. Tests replace `etcd`."""

    topology: Topology
    cluster: Cluster
    listeners: tuple[Listener, ...] = ()
    ours: dict[int, str] = field(default_factory=dict, hash=False)
    etcd: Callable[[str], tuple[str, str]] = ask_etcd


def check(facts: ClusterFacts) -> list[Finding]:
    """Run all checks."""
    return [finding for one in CHECKS for finding in one(facts)]


def wildcards(facts: ClusterFacts) -> Iterator[Finding]:
    """Listeners that everybody reaches who reaches any address of the machine."""
    proxy = facts.topology.proxy
    found = {listener.port: listener for listener in facts.listeners if listener.address in ANY_ADDRESS}
    if proxy.host in ANY_ADDRESS and proxy.port not in found:
        yield _open("proxy.host", f"{proxy.host}:{proxy.port}", "the topology")
    for port, listener in sorted(found.items()):
        where = f"{listener.address}:{port}"
        if port in facts.ours:
            yield _open(facts.ours[port], where, f"/proc/net/tcp, pid {listener.pid}")
        else:
            yield Finding(
                "cluster.library", Severity.WARNING, f"pid {listener.pid}", f"a library listens at {where}",
                "one address of this machine", "/proc/net/tcp",
                "Mooncake and others always listen everywhere, without a secret", f"a firewall for port {port}",
            )  # fmt: skip
    if not found and proxy.host not in ANY_ADDRESS:
        count = len(facts.listeners)
        yield Finding("cluster.listen", Severity.OK, "listeners", f"{count} of the service, each at one address")


def _open(subject: str, where: str, evidence: str) -> Finding:
    return Finding(
        "cluster.listen", Severity.CRITICAL, subject, f"listens at {where}", "the node's own address", evidence,
        "whoever reaches any interface of this machine reaches it",
        "leave proxy.host out: each node's proxy then listens at its address in cluster.interface",
    )  # fmt: skip


def plain_kv(facts: ClusterFacts) -> Iterator[Finding]:
    """KV that crosses the network as it is."""
    backend, protocol = facts.topology.transfer.backend, facts.topology.transfer.protocol
    far = [name for name, info in TRANSPORTS.items() if info.crosses_hosts and backend in ("auto", name)]
    if far:
        over = "RDMA or TCP" if protocol == "auto" else protocol.upper()
        yield Finding(
            "cluster.plain_kv", Severity.INFO, "transfer", f"KV moves over {over} ({', '.join(far)}) unencrypted",
            "a network for KV that only the nodes reach", "[transfer]",
            "KV is the prompt: whoever sees it on the wire can read that, whatever the certificates protect",
        )  # fmt: skip


def certificates(facts: ClusterFacts) -> Iterator[Finding]:
    """Prompts and the secret in the clear between nodes."""
    if not facts.cluster.certificates:
        yield Finding(
            "cluster.certificates", Severity.WARNING, "cluster.certificates", "not set", "a certificate for each node",
            "the topology", "prompts, answers and the service's secret cross the network as they are",
            "pdctl cluster init, then certificates = FOLDER under [cluster]",
        )  # fmt: skip
    plain = [url for url in facts.cluster.etcd if url.startswith("http://")]
    if plain and facts.cluster.etcd_user:
        yield Finding(
            "cluster.certificates", Severity.WARNING, "cluster.etcd", f"{plain[0]} is not https", "https://",
            "the topology", "the password of cluster.etcd_user crosses the network as it is", "give etcd a certificate",
        )  # fmt: skip


def own_certificate(facts: ClusterFacts) -> Iterator[Finding]:
    """This node's certificate: whether it can be used, and whether somebody renews it."""
    if not (folder := facts.cluster.certificates):
        return
    try:
        found = identity_in(folder)
    except PdctlError as failure:
        yield Finding(
            "cluster.certificate", Severity.CRITICAL, "cluster.certificates", str(failure), "a usable one",
            folder, "the agent cannot start, or others refuse its processes soon", failure.hint or "",
        )  # fmt: skip
        return
    service, left_s = facts.topology.service.name, found.ends - time.time()
    if found.who.service != service:
        yield Finding(
            "cluster.certificate", Severity.CRITICAL, "cluster.certificates", f"it is of service {found.who.service}",
            service, folder, "the agent cannot start", "pdctl cluster join, or certify",
        )  # fmt: skip
    elif left_s < _RENEWED_BY * (found.ends - found.begins):
        yield Finding(
            "cluster.certificate", Severity.WARNING, f"node {found.who.node}", f"it ends in {left_s / 86400:.1f} days",
            "renewed when half of its life is over", folder, "then all other nodes refuse this one",
            "a timer for: pdctl cluster renew",
        )  # fmt: skip
    else:
        until = time.strftime("%Y-%m-%d", time.gmtime(found.ends))
        yield Finding("cluster.certificate", Severity.OK, f"node {found.who.node}", f"certified until {until}")


def secret(facts: ClusterFacts) -> Iterator[Finding]:
    """Secrets that are missing, or that other users can read."""
    named = [("cluster.secret_file", facts.cluster.secret_file)]
    named += [("cluster.etcd_password_file", facts.cluster.etcd_password_file)] if facts.cluster.etcd_user else []
    for key, path in named:
        try:
            mode = Path(path).stat().st_mode & 0o777
            Path(path).read_bytes()
        except OSError as failure:
            yield Finding(
                "cluster.secret", Severity.CRITICAL, key, f"{path} cannot be read: {failure.strerror}", "a file",
                path, "the agent cannot start", "copy it from another node, or: pdctl cluster init",
            )  # fmt: skip
            continue
        if mode & 0o077:
            yield Finding(
                "cluster.secret", Severity.CRITICAL, key, f"{path} has mode {mode:o}", "600", path,
                "every user of this machine who reads it can command the service", f"chmod 600 {path}",
            )  # fmt: skip


def registry(facts: ClusterFacts) -> Iterator[Finding]:
    """Members of etcd that do not answer, or are of a version that was not tried."""
    urls = facts.cluster.etcd
    with ThreadPoolExecutor(max_workers=min(8, len(urls) or 1)) as pool:
        told = dict(zip(urls, pool.map(facts.etcd, urls), strict=True))
    silent = {url: why for url, (version, why) in told.items() if not version}
    # The service needs most of its members.
    severity = Severity.CRITICAL if 2 * len(silent) >= len(urls) else Severity.WARNING
    for url, why in silent.items():
        yield Finding(
            "cluster.etcd", severity, url, f"does not answer: {why}", "etcd", "GET /version",
            "without most of etcd's members nothing is placed or published; what runs goes on" if severity is
            Severity.CRITICAL else "one more may not fail", "start it, or check the firewall",
        )  # fmt: skip
    versions = {url: version for url, (version, _) in told.items() if version}
    for url, version in versions.items():
        number = _number(version)
        if number is not None and not _OLDEST <= number <= _NEWEST:
            yield Finding(
                "cluster.etcd_version", Severity.WARNING, url, version, "3.4 to 3.7", "GET /version",
                "pdctl was not tried with it", "another version of etcd",
            )  # fmt: skip
    if not silent:
        shown = ", ".join(sorted(set(versions.values()) - {"?"})) or "by TLS"
        yield Finding("cluster.etcd", Severity.OK, "etcd", f"{len(versions)} of {len(urls)} members answer: {shown}")


def _number(version: str) -> tuple[int, int] | None:
    """The first two parts of a version; None if it is not known."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


CHECKS: tuple[Callable[[ClusterFacts], Iterator[Finding]], ...] = (
    wildcards, plain_kv, certificates, own_certificate, secret, registry,
)  # fmt: skip
