"""Counters between two samples: each rule fires above its threshold, but not at it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pdctl.doctor import Severity
from pdctl.doctor.counters import RULES, Kept, Sample, compare, sample, traffic
from pdctl.host.devices.rdma import read_tree
from pdctl.host.devices.sysfs import Reader
from tests.doctor.trees import Port, Tree, roce


def samples(name: str, by: int, seconds: float, **more: int) -> tuple[Sample, Sample]:
    before = {name: 100, **dict.fromkeys(more, 0)}
    return Sample("b", 1000.0, {"m:1": before}), Sample("b", 1000.0 + seconds, {"m:1": {name: 100 + by, **more}})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.id} {rule.names[0]}")
def test_each_rule(rule: object) -> None:
    from pdctl.doctor.counters import Rule

    assert isinstance(rule, Rule)
    for name in rule.names:
        most = max(rule.least, int(rule.per_s * 100))
        found = compare(*samples(name, most + 1, 100.0))
        assert [(f.id, f.severity) for f in found] == [(rule.id, rule.severity)], name
        assert f"{name} +{most + 1} in 100 s" in found[0].observed
        assert not compare(*samples(name, most, 100.0))


@pytest.mark.parametrize(("wrong", "severity"), [(1, None), (5, Severity.WARNING), (500, Severity.CRITICAL)])
def test_packets_out_of_sequence(wrong: int, severity: Severity | None) -> None:
    found = compare(*samples("out_of_sequence", wrong, 10.0, port_rcv_packets=1_000_000))
    assert [f.severity for f in found if f.id == "tx.oos"] == ([severity] if severity else [])


def test_a_reset_is_no_negative_rate() -> None:
    found = compare(*samples("symbol_error", -100, 10.0))
    assert [(f.id, f.severity) for f in found] == [("err.reset", Severity.INFO)]


def test_another_boot_has_nothing_in_common() -> None:
    before, after = samples("link_downed", 3, 10.0)
    assert compare(before, after)
    assert not compare(Sample("other", before.at, before.ports), after)
    assert not compare(after, before)


def test_words_are_bytes_times_four() -> None:
    moved = traffic(*samples("port_rcv_data", 250_000_000, 2.0))
    assert moved == {"m:1": (0.5, 0.0)}


def test_what_is_sampled(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "sys")
    hw = {"np_cnp_sent": "7", "lifespan": "10"}
    device = tree.hca("mlx5_0", {1: roce(counters={"link_downed": "3"}, hw_counters=hw)})
    tree.netdev("eth1", device.resolve(), carrier_changes="5")
    (device.resolve() / "../../aer_dev_fatal").resolve().write_text("Undefined 0\nTOTAL_ERR_FATAL 2\n")
    reader = Reader()
    found = sample(read_tree(tree.root, tmp_path, reader), "b", 1.0, tree.root, reader).ports["mlx5_0:1"]
    assert found["link_downed"] == 3
    assert found["np_cnp_sent"] == 7
    assert found["carrier_changes"] == 5
    assert found["aer_fatal"] == 2
    assert "lifespan" not in found


def test_kept_for_the_next_run(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "state", Path("/sys"))
    assert kept.last() is None
    found = Sample("b", 5.0, {"m:1": {"symbol_error": 3}})
    kept.keep(found)
    assert kept.last() == found
    assert Kept(tmp_path / "state", Path("/other")).last() is None
    next((tmp_path / "state").glob("*.json")).write_text("{")
    assert kept.last() is None
    Kept(Path("/proc/nowhere"), Path("/sys")).keep(found)


def run(tree: Tree, state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pdctl", "doctor", *words, "--sysfs-root", str(tree.root)]
    env = {**os.environ, "PDCTL_STATE": str(state)}
    return subprocess.run(argv, env=env, cwd=tree.root, capture_output=True, text=True, timeout=300)


def test_the_next_run_says_what_has_grown(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "sys")
    device = tree.hca("mlx5_0", {1: Port()})
    ids = [f["id"] for f in json.loads(run(tree, tmp_path, "rdma", "--json").stdout)["findings"]]
    assert "link.flap" not in ids
    (device / "ports/1/counters/link_downed").write_text("2\n")
    found = {f["id"]: f for f in json.loads(run(tree, tmp_path, "rdma", "--json").stdout)["findings"]}
    assert found["link.flap"]["severity"] == "critical"
    assert found["link.flap"]["observed"].startswith("link_downed +2 in ")
    ids = [f["id"] for f in json.loads(run(tree, tmp_path, "rdma", "--json").stdout)["findings"]]
    assert "link.flap" not in ids, "told once"


def test_watching(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "sys")
    device = tree.hca("mlx5_0", {1: Port()})
    errors = device / "ports/1/counters/local_link_integrity_errors"
    grown = threading.Event()

    def grow() -> None:
        count = 0
        while not grown.wait(0.02):
            count += 1
            # As in the kernel: a file is never empty for a moment.
            (tmp_path / "next").write_text(f"{count}\n")
            (tmp_path / "next").replace(errors)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        done = run(tree, tmp_path, "rdma", "--watch", "--interval", "0.3", "--count", "2")
        as_json = run(tree, tmp_path, "rdma", "--watch", "--interval", "0.3", "--count", "1", "--json")
    finally:
        grown.set()
        thread.join()
    assert done.returncode == 2, done.stderr
    assert "mlx5_0:1 0.000 in 0.000 out GB/s" in done.stdout
    assert "critical: mlx5_0:1 local_link_integrity_errors +" in done.stdout
    [line] = as_json.stdout.splitlines()
    assert set(json.loads(line)) == {"ports", "findings"}
