from __future__ import annotations

import pytest
import torch

from pdctl.engine.model.precision import choose_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "expected"),
    [
        ("auto", CPU, torch.float32), ("auto", GPU, torch.bfloat16), ("float32", GPU, torch.float32),
        ("bfloat16", CPU, torch.bfloat16), ("float16", GPU, torch.float16),
    ],
)  # fmt: skip
def test_a_name_or_the_device_decides(wanted: str, device: torch.device, expected: torch.dtype) -> None:
    assert choose_dtype(wanted, device) is expected
