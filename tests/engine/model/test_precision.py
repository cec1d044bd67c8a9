from __future__ import annotations

import pytest
import torch

from pdctl.engine.model import precision
from pdctl.engine.model.native import NotCompiled
from pdctl.engine.model.precision import choose_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "expected"),
    [
        ("auto", GPU, torch.bfloat16), ("float32", GPU, torch.float32),
        ("bfloat16", CPU, torch.bfloat16), ("float32", CPU, torch.float32), ("float16", GPU, torch.float16),
    ],
)  # fmt: skip
def test_a_name_or_the_device_decides(wanted: str, device: torch.device, expected: torch.dtype) -> None:
    assert choose_dtype(wanted, device) is expected


@pytest.mark.parametrize(
    ("can", "threads", "compiles", "expected"),
    [
        ({"avx512_bf16": True}, 1, True, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, 1, True, torch.bfloat16),
        ({"avx2": True}, 1, True, torch.float32),
        ({"avx512_bf16": True}, 2, True, torch.float32),
        ({"avx512_bf16": True}, 1, False, torch.float32),
    ],
)  # fmt: skip
def test_a_cpu_computes_in_bfloat16_if_that_is_fast_and_answers_stay_equal(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, bool], threads: int, compiles: bool, expected: torch.dtype
) -> None:
    def library() -> None:
        if not compiles:
            raise NotCompiled("no compiler")

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(precision, "library", library)
    assert choose_dtype("auto", CPU) is expected
