"""PCI classes over fake sysfs trees of published machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdctl.host.devices.pci import node_cpus, numa_node, path_class, read_layout
from pdctl.host.devices.rdma import read_rdma


def device(root: Path, path: str, node: int) -> str:
    """A PCI function at `path` below /sys/devices; its address."""
    folder = root / "devices" / path
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text(f"{node}\n")
    bus = root / "bus/pci/devices"
    bus.mkdir(parents=True, exist_ok=True)
    (bus / folder.name).symlink_to(folder)
    return folder.name


def nic(root: Path, name: str, path: str, node: int) -> str:
    address = device(root, path, node)
    folder = root / "class/infiniband" / name
    (folder / "ports/1").mkdir(parents=True)
    (folder / "ports/1/state").write_text("4: ACTIVE\n")
    (folder / "device").symlink_to(root / "devices" / path)
    return address


def hgx_h100(root: Path) -> tuple[list[str], list[str]]:
    """One GPU and one NIC behind each switch, one root complex each, four of them per socket."""
    gpus, nics = [], []
    for number in range(8):
        node, bus = number // 4, 0x10 + 0x10 * number
        port = f"pci0000:{bus:02x}/0000:{bus:02x}:01.0/0000:{bus + 1:02x}:00.0"
        gpus.append(device(root, f"{port}/0000:{bus + 2:02x}:00.0/0000:{bus + 3:02x}:00.0", node))
        nics.append(nic(root, f"mlx5_{number}", f"{port}/0000:{bus + 2:02x}:01.0/0000:{bus + 4:02x}:00.0", node))
    return gpus, nics


def test_hgx_h100_as_nvidia_smi_shows_it(tmp_path: Path) -> None:
    """PIX to its own NIC, NODE to the others of its socket, SYS to the rest."""
    gpus, nics = hgx_h100(tmp_path)
    for i, gpu in enumerate(gpus):
        row = [path_class(gpu, nic_, tmp_path) for nic_ in nics]
        assert row == ["PIX" if i == j else "NODE" if i // 4 == j // 4 else "SYS" for j in range(8)]


def test_dgx_a100_as_nvidia_smi_shows_it(tmp_path: Path) -> None:
    """Two GPUs and two NICs behind a two-level switch: PXB between them."""
    root = "pci0000:00/0000:00:01.1/0000:01:00.0"
    gpus = [
        device(tmp_path, f"{root}/0000:02:0{n}.0/0000:0{5 + n}:00.0/0000:1{n}:00.0/0000:2{n}:00.0", 3) for n in (0, 1)
    ]
    nics = [
        device(tmp_path, f"{root}/0000:02:1{n}.0/0000:0{8 + n}:00.0/0000:3{n}:00.0/0000:4{n}:00.0", 3) for n in (0, 1)
    ]
    assert {path_class(gpu, nic_, tmp_path) for gpu in gpus for nic_ in nics} == {"PXB"}


def test_a_workstation(tmp_path: Path) -> None:
    """Both in slots of the same root complex."""
    gpu = device(tmp_path, "pci0000:00/0000:00:01.0/0000:01:00.0", 0)
    card = device(tmp_path, "pci0000:00/0000:00:03.0/0000:02:00.0", 0)
    assert path_class(gpu, card, tmp_path) == "PHB"


@pytest.mark.parametrize(("nodes", "expected"), [((-1, -1), "SYS"), ((0, -1), "SYS"), ((1, 1), "NODE")])
def test_firmware_that_does_not_say_where(tmp_path: Path, nodes: tuple[int, int], expected: str) -> None:
    a = device(tmp_path, "pci0000:00/0000:00:01.0/0000:01:00.0", nodes[0])
    b = device(tmp_path, "pci0000:80/0000:80:01.0/0000:81:00.0", nodes[1])
    assert path_class(a, b, tmp_path) == expected
    assert numa_node("0000:ff:00.0", tmp_path) == -1


def test_what_sysfs_does_not_know(tmp_path: Path) -> None:
    assert path_class("0000:01:00.0", "0000:02:00.0", tmp_path) == "?"
    assert node_cpus(tmp_path) == {}
    assert read_rdma(tmp_path) == ()


def test_the_whole_layout(tmp_path: Path) -> None:
    gpus, _ = hgx_h100(tmp_path)
    for node, cpus in ((0, "0-3,8-11\n"), (1, "4-7,12-15\n")):
        folder = tmp_path / "devices/system/node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus)
    devices = {found.name: found.pci for found in read_rdma(tmp_path)}
    layout = read_layout(gpus, devices, tmp_path)
    assert layout.cpus[1] == (4, 5, 6, 7, 12, 13, 14, 15)
    assert layout.nodes[gpus[5]] == 1
    assert layout.classes[gpus[2], "mlx5_2"] == "PIX"
