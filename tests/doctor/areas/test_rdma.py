"""Each check of the RDMA area: a tree that makes it fire, and one that does not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict, Unpack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdctl.doctor import Finding, Severity, exit_code
from pdctl.doctor.areas.rdma import RdmaFacts, Wanted, check
from pdctl.host.devices.rdma import natural, read_tree, roce_mtu
from pdctl.host.devices.sysfs import Answer, Reader
from pdctl.topology.spec import Expect
from tests.doctor.trees import TREES, Port, PortFiles, Tree, roce


def findings(
    tree: Tree,
    env: dict[str, str] | None = None,
    devices: tuple[str, ...] = (),
    required: bool = False,
    nodes: bool = True,
    expect: Expect | None = None,
) -> list[Finding]:
    """Facts of a tree, by default with character devices."""
    dev = tree.root.parent / "dev"
    (dev / "infiniband").mkdir(parents=True, exist_ok=True)
    if nodes:
        for number in range(16):
            (dev / "infiniband" / f"uverbs{number}").touch()
    reader = Reader(deadline_s=0.2)
    snapshot = read_tree(tree.root, dev, reader)
    return check(RdmaFacts(snapshot, Wanted(devices, required, expect or Expect()), env or {}, tree.root, reader))


def bad(found: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.id, finding.severity.value) for finding in found if finding.severity is not Severity.OK}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "sys"


def one(root: Path, port: Port) -> Tree:
    tree = Tree(root)
    tree.hca("mlx5_0", {1: port})
    return tree


def with_netdev(root: Path, mtu: str = "9000", **more: Unpack[PortFiles]) -> Tree:
    tree = Tree(root)
    device = tree.hca("mlx5_0", {1: roce(**more)})
    tree.netdev("eth1", device.resolve(), mtu=mtu)
    return tree


def test_a_good_port_is_ok_and_nothing_else(root: Path) -> None:
    found = findings(one(root, Port()))
    assert [(f.id, f.severity, f.subject) for f in found] == [("port.state", Severity.OK, "mlx5_0:1")]
    assert found[0].observed == "ACTIVE, LinkUp, 400 Gb/sec (4X NDR), InfiniBand"
    assert exit_code(found) == 0
    assert not bad(findings(with_netdev(root.parent / "b")))


class Options(TypedDict, total=False):
    """Of `findings`."""

    env: dict[str, str]
    devices: tuple[str, ...]
    required: bool
    nodes: bool
    expect: Expect


ETHERNET: Options = {"expect": Expect(link_layer="ethernet")}
FIRES: dict[str, tuple[Callable[[Path], Tree], Options, tuple[str, str]]] = {
    "down": (lambda r: one(r, Port(state="1: DOWN", phys_state="3: Disabled")), {}, ("port.state", "warning")),
    "down and wanted": (
        lambda r: one(r, Port(state="1: DOWN", phys_state="2: Polling")),
        {"required": True},
        ("port.state", "critical"),
    ),
    "init": (lambda r: one(r, Port(state="2: INIT")), {}, ("port.state", "warning")),
    "no state": (lambda r: one(r, Port(state=None)), {}, ("port.state", "unknown")),
    "no lid": (lambda r: one(r, Port(lid="0x0")), {}, ("port.lid", "critical")),
    "lid not set": (lambda r: one(r, Port(lid="0xffff")), {}, ("port.lid", "critical")),
    "no subnet manager": (lambda r: one(r, Port(sm_lid="0x0")), {}, ("port.lid", "critical")),
    "no rate": (lambda r: one(r, Port(rate="fast")), {}, ("port.rate", "unknown")),
    "errors": (lambda r: one(r, Port(counters={"link_downed": "3"})), {}, ("err.counters", "info")),
    "full counter": (lambda r: one(r, Port(counters={"symbol_error": "65535"})), {}, ("err.counters", "warning")),
    "no v2 gid": (lambda r: with_netdev(r, gids=[("fe80::1", "RoCE v2", "eth1")]), {}, ("roce.gid", "critical")),
    "no gid": (lambda r: with_netdev(r, gids=[]), {}, ("roce.gid", "critical")),
    "index at nothing": (with_netdev, {"env": {"MC_GID_INDEX": "7"}}, ("roce.gid_index", "critical")),
    "index at v1": (with_netdev, {"env": {"NCCL_IB_GID_INDEX": "2"}}, ("roce.gid_index", "critical")),
    "small mtu": (lambda r: with_netdev(r, mtu="1500"), {}, ("roce.mtu", "warning")),
    "mtu too large": (lambda r: with_netdev(r, mtu="1500"), {"env": {"MC_MTU": "4096"}}, ("roce.mtu", "critical")),
    "no node": (lambda r: one(r, Port()), {"nodes": False}, ("port.chardev", "critical")),
    "named and missing": (lambda r: one(r, Port()), {"devices": ("mlx5_7",)}, ("port.gone", "critical")),
    "half gone": (TREES["dangling link"], {}, ("port.gone", "warning")),
    "slower than expected": (lambda r: one(r, Port()), {"expect": Expect(rate_gbps=800)}, ("port.rate", "critical")),
    "not Ethernet": (lambda r: one(r, Port()), ETHERNET, ("port.link_layer", "critical")),
    "mtu below what is expected": (
        lambda r: with_netdev(r, mtu="4000"),
        {"expect": Expect(mtu=4096)},
        ("roce.mtu", "warning"),
    ),
    "expected index at v1": (with_netdev, {"expect": Expect(gid_index=0)}, ("roce.gid_index", "critical")),
    "none": (TREES["no class"], {}, ("rdma.none", "info")),
    "none, wanted": (TREES["no class"], {"required": True}, ("rdma.none", "critical")),
    "modules only": (TREES["empty"], {"required": True}, ("rdma.none", "critical")),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(root: Path, name: str) -> None:
    make, options, expected = FIRES[name]
    found = findings(make(root), **options)
    assert expected in bad(found)
    told = next(finding for finding in found if finding.id == expected[0])
    assert told.observed
    if told.severity is Severity.CRITICAL:
        assert told.fix


QUIET: dict[str, Callable[[Path], Tree]] = {
    "a down port's rate": lambda r: one(r, Port(state="1: DOWN", rate="10 Gb/sec (4X)")),
    "RoCE has no lid": with_netdev,
    "jumbo frames": lambda r: with_netdev(r, mtu="4200"),
    "an index that is right": with_netdev,
}


@pytest.mark.parametrize(
    ("name", "id_", "env"),
    [
        ("a down port's rate", "port.rate", {}),
        ("RoCE has no lid", "port.lid", {}),
        ("jumbo frames", "roce.mtu", {}),
        ("an index that is right", "roce.gid_index", {"MC_GID_INDEX": "3"}),
    ],
)
def test_does_not_fire(root: Path, name: str, id_: str, env: dict[str, str]) -> None:
    assert id_ not in {found for found, _ in bad(findings(QUIET[name](root), env))}


def test_a_second_port_that_is_down_leaves_the_card_usable(root: Path) -> None:
    tree = Tree(root)
    tree.hca("mlx5_0", {1: Port(), 2: Port(state="1: DOWN", phys_state="2: Polling")})
    for devices in ((), ("mlx5_0",)):
        assert bad(findings(tree, devices=devices, required=True)) == {("port.state", "warning")}


@pytest.mark.parametrize("value", ["-1", "auto", ""])
def test_an_index_that_is_left_to_the_library(root: Path, value: str) -> None:
    assert not bad(findings(with_netdev(root), env={"NCCL_IB_GID_INDEX": value, "UCX_IB_GID_INDEX": value}))


def test_what_is_as_expected(root: Path) -> None:
    expect = Expect(rate_gbps=100, link_layer="ethernet", mtu=4096, gid_index=3)
    assert not bad(findings(with_netdev(root), expect=expect))


def test_the_slow_one_of_several(root: Path) -> None:
    tree = Tree(root)
    for number in range(4):
        port = Port(rate="200 Gb/sec (2X NDR)") if number == 2 else Port()
        tree.hca(f"mlx5_{number}", {1: port}, bus=2 * number + 1)
    slow = [f for f in findings(tree) if f.id == "port.rate"]
    assert [(f.subject, f.severity, f.expected) for f in slow] == [
        ("mlx5_2:1", Severity.CRITICAL, "400 Gb/s, like its peers")
    ]


def test_a_slow_card_of_another_board(root: Path) -> None:
    tree = Tree(root)
    for number in range(3):
        tree.hca(f"mlx5_{number}", {1: Port()}, bus=2 * number + 1)
    tree.hca("mlx5_3", {1: Port(rate="100 Gb/sec (4X EDR)")}, bus=9, board_id="management")
    assert not [f for f in findings(tree) if f.id == "port.rate"]


def test_firmware_that_differs_on_one_board(root: Path) -> None:
    tree = Tree(root)
    tree.hca("mlx5_0", {1: Port()}, fw_ver="28.39.2048")
    tree.hca("mlx5_1", {1: Port()}, bus=5, fw_ver="28.40.1000")
    tree.hca("mlx5_2", {1: Port()}, bus=9, fw_ver="22.1.1", board_id="other")
    assert ("fw.mix", "warning") in bad(findings(tree))


@pytest.mark.parametrize(
    ("file", "value", "expected"),
    [
        ("current_link_width", "8", ("pcie.width", "critical")),
        ("current_link_speed", "16.0 GT/s PCIe", ("pcie.speed", "warning")),
        ("current_link_width", "Unknown", None),
        ("current_link_width", "0", None),
    ],
)
def test_pci_links(root: Path, file: str, value: str, expected: tuple[str, str] | None) -> None:
    tree = one(root, Port())
    (root / "class/infiniband/mlx5_0/device" / file).write_text(f"{value}\n")
    assert bad(findings(tree)) == ({expected} if expected else set())


def test_only_what_a_topology_uses_is_judged(root: Path) -> None:
    tree = Tree(root)
    tree.hca("mlx5_0", {1: Port()})
    tree.hca("storage0", {1: Port(state="1: DOWN")}, bus=5)
    assert bad(findings(tree))
    assert not bad(findings(tree, devices=("mlx5_0",)))


@pytest.mark.parametrize("name", TREES)
def test_no_tree_makes_it_stumble(root: Path, name: str) -> None:
    found = findings(TREES[name](root))
    assert found, "something is said of every tree"
    assert all(finding.id and finding.subject and finding.observed for finding in found)
    assert json.loads(json.dumps([finding.to_dict() for finding in found]))


TEXT = st.one_of(st.none(), st.text(st.characters(min_codepoint=9, max_codepoint=0x2FF), max_size=20))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Port,
        TEXT,
        TEXT,
        TEXT,
        TEXT,
        TEXT,
        TEXT,
        st.lists(st.tuples(st.text("f0:e8", max_size=39), st.text(max_size=9), st.just("")), max_size=3),
    )
)
def test_nor_any_port(tmp_path_factory: pytest.TempPathFactory, port: Port) -> None:
    port.gids = [(gid.replace("\n", ""), kind.replace("\0", ""), "") for gid, kind, _ in port.gids]
    tree = one(tmp_path_factory.mktemp("any") / "sys", port)
    assert findings(tree)


def test_reads_that_fail_are_told_apart(root: Path) -> None:
    tree = one(root, Port())
    folder = root / "class/infiniband/mlx5_0/ports/1"
    (folder / "rate").unlink()
    (folder / "rate").mkdir()
    (folder / "lid").unlink()
    reader = Reader(deadline_s=0.2)
    assert reader.read(folder / "lid").answer is Answer.MISSING
    assert reader.read(folder / "rate").answer is Answer.MISSING
    assert reader.read(folder / "state").text == "4: ACTIVE"
    assert ("port.rate", "unknown") in bad(findings(tree))


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        (errno.EINVAL, Answer.INVALID),
        (errno.EACCES, Answer.DENIED),
        (errno.ENODEV, Answer.GONE),
        (errno.EIO, Answer.INVALID),
    ],
)
def test_files_that_the_kernel_will_not_read(
    root: Path, code: int, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Break each file of a port in turn: a finding or none, but never a traceback and never a good state."""
    tree = with_netdev(root)
    real, failing = os.read, ""

    def read(descriptor: int, size: int) -> bytes:
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith(failing):
            raise OSError(code, os.strerror(code))
        return real(descriptor, size)

    monkeypatch.setattr(os, "read", read)
    for failing in ("ports/1/state", "ports/1/rate", "ports/1/lid", "gids/0", "types/3", "link_layer", "fw_ver", "mtu"):
        assert findings(tree), failing
    failing = "ports/1/state"
    assert Reader().read(root / "class/infiniband/mlx5_0/ports/1/state").answer is answer
    assert ("port.state", "unknown") in bad(findings(tree))
    failing = "ports/1/rate"
    assert ("port.state", "ok") not in {(f.id, f.severity.value) for f in findings(tree) if f.id == "port.rate"}


def test_a_device_that_goes_away_while_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(root)
    tree.hca("mlx5_0", {1: Port()})
    gone = tree.hca("mlx5_1", {1: Port()}, bus=5).resolve()
    real, observed = os.read, []

    def read(descriptor: int, size: int) -> bytes:
        if "mlx5_1" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            observed.append(descriptor)
            if len(observed) == 5:
                shutil.rmtree(gone)
        return real(descriptor, size)

    monkeypatch.setattr(os, "read", read)
    found = findings(tree)
    assert len(observed) >= 5
    assert any(f.subject.startswith("mlx5_1") and f.severity is not Severity.OK for f in found)
    assert any(f.subject == "mlx5_0:1" and f.severity is Severity.OK for f in found)


def test_a_read_that_hangs_is_given_up(root: Path) -> None:
    tree = one(root, Port())
    state = root / "class/infiniband/mlx5_0/ports/1/state"
    state.unlink()
    os.mkfifo(state)
    began = time.monotonic()
    found = findings(tree)
    assert time.monotonic() - began < 10
    assert ("port.state", "unknown") in bad(found)
    # Release the thread that still hangs in this read.
    os.close(os.open(state, os.O_WRONLY | os.O_NONBLOCK))


def test_another_root_is_the_only_one_read(root: Path) -> None:
    """Every file that is opened, listed or checked is below the given roots."""
    tree = TREES["dual port"](root)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "import pdctl.doctor.areas.rdma, pdctl.host.devices.rdma, pdctl.host.devices.sysfs\n"
        "opened = []\n"
        "looks = ('open', 'os.listdir', 'os.scandir')\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in looks else None)\n"
        f"pdctl.host.devices.rdma.read_tree(Path({str(root)!r}), Path({str(root.parent)!r}))\n"
        f"out = [name for name in opened if not name.startswith({str(root)!r})]\n"
        "print(out)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert tree.root.exists()


def test_names_are_ordered_as_people_count() -> None:
    assert sorted(["mlx5_10", "mlx5_2", "a1", "mlx5_bond_0"], key=natural) == ["a1", "mlx5_2", "mlx5_10", "mlx5_bond_0"]


@pytest.mark.parametrize(
    ("netdev", "rdma"), [(1500, 1024), (4200, 4096), (9000, 4096), (4092, 2048), (576, 256), (90, 0)]
)
def test_the_mtu_that_a_netdev_leaves(netdev: int, rdma: int) -> None:
    assert roce_mtu(netdev) == rdma
