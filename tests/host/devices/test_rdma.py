from __future__ import annotations

from pathlib import Path

from pdctl.host.devices.rdma import active_devices


def port(root: Path, device: str, number: int, state: str) -> None:
    folder = root / "class" / "infiniband" / device / "ports" / str(number)
    folder.mkdir(parents=True)
    (folder / "state").write_text(state)


def test_only_devices_with_an_active_port_count(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_1", 1, "4: ACTIVE\n")
    port(tmp_path, "mlx5_0", 1, "1: DOWN\n")
    port(tmp_path, "mlx5_2", 1, "1: DOWN\n")
    port(tmp_path, "mlx5_2", 2, "4: ACTIVE\n")
    assert active_devices(tmp_path) == ["mlx5_1", "mlx5_2"]


def test_no_rdma_at_all(tmp_path: Path) -> None:
    assert active_devices(tmp_path) == []


def test_a_port_that_cannot_be_read_is_not_up(tmp_path: Path) -> None:
    (tmp_path / "class" / "infiniband" / "x" / "ports" / "1" / "state").mkdir(parents=True)
    assert active_devices(tmp_path) == []
