"""What a node of a cluster exposes, its secrets, and etcd."""

from __future__ import annotations

import http.server
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.doctor import Area
from pdctl.doctor.areas.cluster import ClusterFacts, ask_etcd, check
from pdctl.doctor.inspection import Inspection, Where
from pdctl.host.processes.ports import Listener, listeners_of
from pdctl.topology.loader import load_cluster_text
from pdctl.topology.spec import Topology
from tests.certificates import EXPIRED, made_ca, made_node

TEXT = """
[service]
name = "chat"
model = "sample:tiny-qwen3"
[cluster]
etcd = ["http://10.0.0.1:2379", "http://10.0.0.2:2379", "http://10.0.0.3:2379"]
interface = "127.0.0.1"
secret_file = "cluster.secret"
[[engines]]
name = "prefill"
role = "prefill"
[[engines]]
name = "decode"
role = "decode"
"""


def topology(folder: Path, text: str = TEXT) -> Topology:
    secret = folder / "cluster.secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    return load_cluster_text(text, str(folder / "pdctl.toml"))


def facts(found: Topology, *listeners: Listener, versions: dict[str, str] | None = None) -> ClusterFacts:
    assert found.cluster is not None
    told = versions if versions is not None else dict.fromkeys(found.cluster.etcd, "3.4.23")

    def etcd(url: str) -> tuple[str, str]:
        return (told[url], "") if url in told else ("", "no route")

    return ClusterFacts(found, found.cluster, listeners, {8000: "proxy http", 18090: "agent"}, etcd)


def said(found: ClusterFacts) -> dict[str, list[str]]:
    by_id: dict[str, list[str]] = {}
    for finding in check(found):
        by_id.setdefault(finding.id, []).append(f"{finding.severity.value} {finding.subject}: {finding.observed}")
    return by_id


def test_a_cluster_without_faults(tmp_path: Path) -> None:
    ca = made_ca(tmp_path / "ca", "chat")
    made_node(ca, tmp_path / "certificates", "a", "10.0.0.1", days=20.0)
    until = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 20 * 86400))
    text = TEXT.replace("secret_file", 'certificates = "certificates"\nsecret_file')
    found = facts(topology(tmp_path, text), Listener("10.0.0.1", 8000, 41), Listener("::1", 18090, 40))
    assert said(found) == {
        "cluster.listen": ["ok listeners: 2 of the service, each at one address"],
        "cluster.plain_kv": [said(found)["cluster.plain_kv"][0]],
        "cluster.certificate": [f"ok node a: certified until {until}"],
        "cluster.etcd": ["ok etcd: 3 of 3 members answer: 3.4.23"],
    }
    assert "unencrypted" in said(found)["cluster.plain_kv"][0]


def test_wildcard_listeners_of_the_service(tmp_path: Path) -> None:
    found = said(
        facts(
            topology(tmp_path), Listener("0.0.0.0", 8000, 41), Listener("::", 16001, 42), Listener("10.0.0.1", 18090, 1)
        )
    )
    assert found["cluster.listen"] == ["critical proxy http: listens at 0.0.0.0:8000"]
    assert found["cluster.library"] == ["warning pid 42: a library listens at :::16001"]
    configured = replace(topology(tmp_path), proxy=replace(topology(tmp_path).proxy, host="::", port=8000))
    assert said(facts(configured))["cluster.listen"] == ["critical proxy.host: listens at :::8000"]


def test_certificates_and_passwords_in_the_clear(tmp_path: Path) -> None:
    found = topology(tmp_path)
    assert said(facts(found))["cluster.certificates"] == ["warning cluster.certificates: not set"]
    assert found.cluster is not None
    user = replace(found, cluster=replace(found.cluster, certificates="x", etcd_user="u", etcd_password_file="none"))
    told = said(facts(user))
    assert told["cluster.certificates"] == ["warning cluster.etcd: http://10.0.0.1:2379 is not https"]
    assert told["cluster.secret"] == ["critical cluster.etcd_password_file: none cannot be read: No such file or "
                                      "directory"]  # fmt: skip


def test_a_certificate_that_ends_has_ended_or_is_of_others(tmp_path: Path) -> None:
    found = facts(topology(tmp_path, TEXT.replace("secret_file", 'certificates = "certificates"\nsecret_file')))
    (missing,) = said(found)["cluster.certificate"]
    assert missing.startswith("critical cluster.certificates: the certificates in ")
    assert "No such file or directory" in missing
    ca = made_ca(tmp_path / "ca", "chat")
    # Backdated by an hour: of 79 minutes, 19 are left.
    made_node(ca, tmp_path / "certificates", "a", "10.0.0.1", days=19 / 1440)
    assert said(found)["cluster.certificate"] == ["warning node a: it ends in 0.0 days"]
    made_node(ca, tmp_path / "certificates", "a", "10.0.0.1", days=EXPIRED)
    assert "certificate has expired" in said(found)["cluster.certificate"][0]
    made_node(made_ca(tmp_path / "other", "talk"), tmp_path / "certificates", "a", "10.0.0.1")
    assert said(found)["cluster.certificate"] == ["critical cluster.certificates: it is of service talk"]


def test_a_secret_that_others_can_read_or_nobody(tmp_path: Path) -> None:
    found = topology(tmp_path)
    assert "cluster.secret" not in said(facts(found))
    (tmp_path / "cluster.secret").chmod(0o640)
    path = tmp_path / "cluster.secret"
    assert said(facts(found))["cluster.secret"] == [f"critical cluster.secret_file: {path} has mode 640"]
    path.unlink()
    assert said(facts(found))["cluster.secret"][0].endswith("cannot be read: No such file or directory")


@pytest.mark.parametrize(("alive", "severity"), [(2, "warning"), (1, "critical"), (0, "critical")])
def test_members_of_etcd_that_do_not_answer(tmp_path: Path, alive: int, severity: str) -> None:
    found = topology(tmp_path)
    assert found.cluster is not None
    told = said(facts(found, versions=dict.fromkeys(found.cluster.etcd[:alive], "3.5.1")))["cluster.etcd"]
    assert told == [f"{severity} {url}: does not answer: no route" for url in found.cluster.etcd[alive:]]


def test_versions_of_etcd(tmp_path: Path) -> None:
    found = topology(tmp_path)
    assert found.cluster is not None
    first, second, third = found.cluster.etcd
    told = said(facts(found, versions={first: "3.3.27", second: "3.7.0", third: "4.0.0-alpha"}))
    assert told["cluster.etcd_version"] == [f"warning {first}: 3.3.27", f"warning {third}: 4.0.0-alpha"]
    assert "cluster.etcd_version" not in said(facts(found, versions=dict.fromkeys(found.cluster.etcd, "?")))


class _Etcd(http.server.BaseHTTPRequestHandler):
    body = b'{"etcdserver":"3.5.9","etcdcluster":"3.5.0"}'

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/version" else 404)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(body: bytes) -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), type("Handler", (_Etcd,), {"body": body}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_version_is_asked_of_the_member_itself() -> None:
    with serving(_Etcd.body) as url:
        assert ask_etcd(url) == ("3.5.9", "")
        assert ask_etcd(f"{url}/") == ("3.5.9", "")
        assert ask_etcd(f"{url}/elsewhere") == ("", "it answers with status 404")
        assert ask_etcd(url.replace("http:", "https:")) == ("?", ""), "no TLS of ours, but somebody is there"
    with serving(b"<html>") as url:
        assert ask_etcd(url)[0] == ""
    assert "refused" in ask_etcd(url)[1]


def test_listeners_are_told_with_their_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("0.0.0.0", 0)) as everywhere:
        found = listeners_of([os.getpid()])
        assert Listener("127.0.0.1", one.getsockname()[1], os.getpid()) in found
        assert Listener("0.0.0.0", everywhere.getsockname()[1], os.getpid()) in found
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both:
        assert Listener("::", both.getsockname()[1], os.getpid()) in listeners_of([os.getpid()])
    assert listeners_of([]) == ()


def test_a_topology_for_several_machines_is_checked_as_this_machine_s_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDCTL_RUN", str(tmp_path / "run"))
    monkeypatch.setattr("pdctl.doctor.areas.cluster._ANSWER_S", 0.05)
    topology(tmp_path)
    # More engines of a kind than any machine has GPUs: those of other machines are not looked for here.
    path = tmp_path / "pdctl.toml"
    near = TEXT.replace("http://10.0.0.", "http://127.0.0.")
    path.write_text(re.sub('role = "(.*)"', r'role = "\1"\ndevice = "cuda"\nreplicas = 200', near))
    inspection = Inspection(Where(path, remembers=False))
    found = inspection.findings((Area.TOPOLOGY, Area.CLUSTER))
    assert {"cluster.etcd", "cluster.certificates"} <= {finding.id for finding in found}
    assert inspection.topology is not None
    assert inspection.topology.engines == ()
    if not inspection.host.gpus:
        here = Inspection(Where(path, engines=frozenset({"decode-0"}), remembers=False))
        assert "topology.invalid" in {finding.id for finding in here.findings((Area.CLUSTER,))}, "no GPU is here"
    path.write_text(near)
    some = Inspection(Where(path, node="a", engines=frozenset({"prefill-0"}), remembers=False))
    assert some.topology is not None
    assert [group.name for group in some.topology.engines] == ["prefill"]
    assert some.plan is not None
    assert [spec.name for spec in some.plan.processes] == ["prefill-0", "proxy"]
    path.write_text(near.replace('interface = "127.0.0.1"', 'interface = "nowhere0"'))
    assert "no interface 'nowhere0'" in Inspection(Where(path)).findings((Area.CLUSTER,))[0].observed
