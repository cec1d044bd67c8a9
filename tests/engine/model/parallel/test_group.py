"""The group that ranks exchange tensors in: what it asks of torch for GPUs, with gloo in NCCL's place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pdctl.engine.model.parallel.group import Ranks, Width

GPU = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, object]]]:
    """The backend and the device of the group."""
    found, real = list[tuple[str, object]](), dist.init_process_group

    def init(backend: str, device_id: torch.device | None = None, **options: object) -> None:
        found.append((backend, device_id))
        real("gloo", **options)  # type: ignore[arg-type]

    monkeypatch.setattr(dist, "init_process_group", init)
    yield found
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("device", "wanted"), [(GPU, [("nccl", GPU)]), (torch.device("cpu"), [("gloo", None)])], ids=["gpu", "cpu"]
)
def test_one_rank_is_a_group_too(
    device: torch.device, wanted: list[tuple[str, object]], asked: list[tuple[str, object]], tmp_path: Path
) -> None:
    group = Ranks(0, Width(), tmp_path / "meet", 30.0, device)
    assert asked == wanted
    group.meet()
    assert (group._meeting is not None) == (device is GPU), "NCCL has no barrier that says who did not come"
    part = torch.arange(6.0).view(2, 3)
    assert torch.equal(group.add(part.clone()), part)
    assert torch.equal(group.join(part), part)
    assert torch.equal(group.gather(part, [2]), part)
    group.close()
    assert dist.is_initialized() == (device is GPU), "NCCL might wait for ranks that are gone"
