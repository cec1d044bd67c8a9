"""PCIe checks over fake trees."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Unpack

import pytest

from pdctl.doctor.areas.pcie import PcieFacts, check
from tests.doctor.trees import PciAttributes, Tree

CARD = "0000:03:00.0"


def tree(root: Path, **bridge: Unpack[PciAttributes]) -> Path:
    """A card below a switch below a root port; `bridge`: attributes of the switch's upper port."""
    made = Tree(root)
    made.pci("pci0000:00/0000:00:01.0", class_="0x060400")
    made.pci("pci0000:00/0000:00:01.0/0000:01:00.0", **bridge)
    made.pci("pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:01.0")
    made.pci(f"pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:01.0/{CARD}")
    return root


def proc(tmp_path: Path, virtual: bool = False, kernel: str = "6.8.0", driver: str = "") -> Path:
    root = tmp_path / "proc"
    files = {"cpuinfo": f"flags : fpu{' hypervisor' if virtual else ''}\n", "sys/kernel/osrelease": f"{kernel}\n"}
    if driver:
        files["driver/nvidia/version"] = driver
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def found(sys: Path, proc: Path, direct: bool = True, mooncake: bool = False, **env: str) -> dict[str, str]:
    facts = PcieFacts({"mlx5_0": CARD}, direct, env, mooncake, sys, proc)
    return {finding.id: finding.severity.value for finding in check(facts)}


def acs(sys: Path, control: int) -> None:
    """Configuration space of the root port: one other capability, then ACS."""
    data = bytearray(4096)
    struct.pack_into("<I", data, 0x100, 0x0001 | 1 << 16 | 0x148 << 20)
    struct.pack_into("<IHH", data, 0x148, 0x000D | 1 << 16, 0x5F, control)
    (sys / "devices/pci0000:00/0000:00:01.0/config").write_bytes(data)


def test_a_narrow_bridge(tmp_path: Path) -> None:
    quiet = proc(tmp_path)
    assert "pcie.path" not in found(tree(tmp_path / "a"), quiet)
    assert found(tree(tmp_path / "b", current_link_width="8"), quiet, direct=False) == {"pcie.path": "critical"}
    # A slot with eight lanes: neither end supports more.
    assert "pcie.path" not in found(tree(tmp_path / "c", current_link_width="8", max_link_width="8"), quiet)
    assert "pcie.path" not in found(tree(tmp_path / "d", current_link_width="0"), quiet)


@pytest.mark.parametrize(
    ("control", "virtual", "severity"), [(0x1D, False, "warning"), (0x1D, True, "info"), (1, False, "")]
)
def test_access_control(tmp_path: Path, control: int, virtual: bool, severity: str) -> None:
    sys = tree(tmp_path / "sys")
    acs(sys, control)
    assert found(sys, proc(tmp_path, virtual)).get("pcie.acs", "") == severity
    assert "pcie.acs" not in found(sys, proc(tmp_path, virtual), direct=False)


def test_a_broken_list_of_capabilities_ends(tmp_path: Path) -> None:
    sys = tree(tmp_path / "sys")
    data = bytearray(4096)
    struct.pack_into("<I", data, 0x100, 0x0001 | 0x100 << 20)
    (sys / "devices/pci0000:00/0000:00:01.0/config").write_bytes(data)
    assert "pcie.acs" not in found(sys, proc(tmp_path))


@pytest.mark.parametrize(("kind", "fires"), [("DMA-FQ", True), ("DMA", True), ("identity", False)])
def test_the_iommu(tmp_path: Path, kind: str, fires: bool) -> None:
    sys = tree(tmp_path / "sys")
    group = sys / "kernel/iommu_groups/7"
    group.mkdir(parents=True)
    (group / "type").write_text(f"{kind}\n")
    (sys / f"bus/pci/devices/{CARD}").resolve().joinpath("iommu_group").symlink_to(group)
    assert ("host.iommu" in found(sys, proc(tmp_path))) == fires
    assert "host.iommu" not in found(sys, proc(tmp_path, virtual=True))


OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15\n"


@pytest.mark.parametrize(
    ("module", "driver", "kernel", "mooncake", "env", "severity"),
    [
        (True, "", "6.8.0", True, {}, "ok"),
        (False, OPEN, "6.8.0", False, {}, "ok"),
        (False, OPEN, "5.4.0", False, {}, "info"),
        (False, "NVRM version: NVIDIA UNIX x86_64 Kernel Module", "6.8.0", False, {}, "info"),
        (False, OPEN, "6.8.0", True, {}, "info"),
        (False, OPEN, "6.8.0", True, {"WITH_NVIDIA_PEERMEM": "0"}, "ok"),
    ],
)
def test_reading_gpu_memory(
    tmp_path: Path, module: bool, driver: str, kernel: str, mooncake: bool, env: dict[str, str], severity: str
) -> None:
    sys = tree(tmp_path / "sys")
    if module:
        (sys / "module/nvidia_peermem").mkdir()
    assert found(sys, proc(tmp_path, False, kernel, driver), True, mooncake, **env)["gdr.access"] == severity
