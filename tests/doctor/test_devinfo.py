"""pdctl's output compared with Debian's `ibv_devinfo`, over fake trees, both with the real libibverbs and a shim."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pdctl.doctor.devinfo import UNKNOWN, devinfo
from pdctl.errors import PdctlError
from pdctl.host.devices.rdma import read_tree
from tests.doctor.trees import TREES, Port, Tree, roce

SHIM = Path(__file__).parents[1] / "fakes" / "verbs_shim.c"
# Mounts the tree as /sys, and a /dev with as many verbs nodes as it has.
_SCRIPT = (
    'mount --rbind "$1" /sys && mkdir -p "$2/infiniband" && '
    "for node in null urandom; do : > $2/$node; mount --bind /dev/$node $2/$node; done && "
    'for verbs in /sys/class/infiniband_verbs/uverbs*; do : > "$2/infiniband/$(basename $verbs)"; done && '
    "mount --rbind $2 /dev && cd / && shift 2 && "
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("ibv_devinfo") is None or not Path("/usr/include/infiniband/verbs.h").exists():
        pytest.skip("Debian's ibverbs-utils and libibverbs-dev are not installed")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here, in which a tree could take the place of /sys")
    found = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", found, SHIM], check=True)
    return found


def over(tree: Tree, shim: Path, dev: Path, argv: str) -> str:
    """The output of `argv` with the tree as /sys. Both tools use the same library."""
    script = _SCRIPT + f"LD_PRELOAD={shim} {argv}"
    whole = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(tree.root), str(dev)]
    env = {**os.environ, "PYTHONPATH": str(SHIM.parent.parent.parent)}
    return subprocess.run(whole, capture_output=True, text=True, env=env).stdout


OURS = f"{sys.executable} -m pdctl doctor --devinfo"


def states(root: Path) -> Tree:
    """A tree with one device of each kind."""
    tree = Tree(root)
    tree.hca("many0", {n + 1: Port(state=f"{n}: X") for n in range(7)})
    return tree


def lmc(root: Path) -> Tree:
    tree = Tree(root)
    folder = tree.hca("mlx5_0", {1: Port()}, hw_rev="a1")
    (folder / "ports/1/lid_mask_count").write_text("3\n")
    return tree


COMPARED = ("infiniband", "roce", "two devices", "dual port", "efa", "iwarp", "roce down", "vf", "armed", "underscores")
MAKERS = {**{name: TREES[name] for name in COMPARED}, "states": states, "lmc": lmc}


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_as_the_real_tool(shim: Path, tmp_path: Path, name: str) -> None:
    tree = MAKERS[name](tmp_path / "sys")
    theirs = over(tree, shim, tmp_path / "dev", "ibv_devinfo")
    assert theirs.startswith("hca_id:"), theirs
    assert over(tree, shim, tmp_path / "dev2", OURS) == theirs


def test_one_port_of_one_device(shim: Path, tmp_path: Path) -> None:
    tree = TREES["two devices"](tmp_path / "sys")
    theirs = over(tree, shim, tmp_path / "dev", "ibv_devinfo -d mlx5_1 -i 1")
    assert theirs.count("hca_id") == 1
    assert over(tree, shim, tmp_path / "dev2", f"{OURS} --port mlx5_1:1") == theirs


def test_without_the_library_it_says_what_it_cannot_know(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "sys")
    tree.hca("mlx5_0", {1: roce()})
    lines = devinfo(read_tree(tree.root, tmp_path), {}).splitlines()
    unknown = [line.split(":")[0].strip() for line in lines if UNKNOWN in line]
    assert unknown == ["vendor_id", "max_mtu", "active_mtu"]
    assert "\tvendor_part_id:\t\t\t4129" in lines
    with pytest.raises(PdctlError, match="no RDMA device 'nope'"):
        devinfo(read_tree(tree.root, tmp_path), {}, ["nope"])
    with pytest.raises(PdctlError, match="no port '9'"):
        devinfo(read_tree(tree.root, tmp_path), {}, ["mlx5_0:9"])


@pytest.mark.parametrize("name", TREES)
def test_no_tree_makes_it_stumble(tmp_path: Path, name: str) -> None:
    assert devinfo(read_tree(TREES[name](tmp_path / "sys").root, tmp_path), {})
