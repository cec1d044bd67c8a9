"""`python -m pdctl.doctor`: a node of a cluster inspects itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec

from pdctl.control_api.examination_messages import NodeReport
from pdctl.doctor.__main__ import Task
from pdctl.host import program
from pdctl.topology.spec import Cluster
from tests.doctor.areas.test_cluster import TEXT


def test_a_report_is_for_this_node_s_part_and_its_own_secrets(tmp_path: Path) -> None:
    secret = tmp_path / "own.secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o644)
    cluster = Cluster(("http://127.0.0.1:1",), "127.0.0.1", str(secret))
    text = TEXT.replace('role = "decode"', 'role = "decode"\ndevice = "cpu"\nreplicas = 200')
    task = Task("a", "127.0.0.1", cluster, frozenset({"prefill-0"}), text, "/elsewhere/pdctl.toml")
    done = subprocess.run(
        program.part("pdctl.doctor"), input=msgspec.json.encode(task), capture_output=True, timeout=120, check=True
    )
    found = msgspec.json.decode(done.stdout, type=NodeReport)
    by_id = {finding.id: finding for finding in found.findings}
    assert by_id["cluster.secret"].subject == "cluster.secret_file"
    assert by_id["cluster.secret"].observed == f"{secret} has mode 644"
    assert by_id["cluster.etcd"].severity == "critical"
    assert by_id["memory.free"].severity == "ok", "200 engines of other nodes need no memory here"
    assert found.traits.mtu > 0


def test_without_a_topology_the_machine_is_inspected(tmp_path: Path) -> None:
    cluster = Cluster(("http://127.0.0.1:1",), "127.0.0.1", "none")
    task = msgspec.json.encode(Task("a", "127.0.0.1", cluster, frozenset(), "", ""))
    done = subprocess.run(program.part("pdctl.doctor"), input=task, capture_output=True, timeout=120, check=True)
    ids = {finding.id for finding in msgspec.json.decode(done.stdout, type=NodeReport).findings}
    assert "runtime.package" in ids
    assert not {one for one in ids if one.startswith("cluster.")}
