"""The Triton kernels on the CPU, in Triton's interpreter, against explicit attention in float64.

Whether kernels are interpreted is decided when they are imported: the tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="run by test_kernels_in_the_interpreter")

if IS_INTERPRETED:
    from pdctl.engine.model.attention import Backend, open_backend
    from pdctl.engine.model.attention.batch import LayerNeed
    from tests.engine.model.attention_mixes import mix

    BACKEND: Backend = open_backend("triton", torch.device("cpu"))

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.skipif(IS_INTERPRETED, reason="this is that process")
def test_kernels_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(IS_INTERPRETED, reason="nothing is compiled there")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("capability", "dtype", "size"), [(80, "bf16", 128), (90, "bf16", 128), (90, "bf16", 256), (90, "fp32", 64)]
)
def test_kernels_compile_for_gpus(
    capability: int, dtype: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Triton's own ptxas, which needs no GPU. 99 KiB of shared memory are what the smallest of these GPUs has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pdctl.engine.model.attention import triton_kernels as kernels
    from pdctl.engine.model.attention.triton_paged import _rows, _sizes, _tile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    sizes = _sizes(torch.empty(1, 1, size), torch.empty(1, 1, size))
    tile = _tile(sizes, kind)
    numbers = {
        **sizes, "HEADS": 32, "GROUP": 4, "GROUP_PAD": 16, "BLOCK": 16, "TILE": tile, "ROWS": _rows(tile), "SPLITS": 16,
        "WINDOW": 512, "SOFTCAP": True, "SINKS": True, "WIDE": False,
    }  # fmt: skip
    pointers = {"starts": "i32", "lengths": "i32", "table": "i32", "parts": "fp32", "part_logs": "fp32"}
    for kernel in (kernels.decode, kernels.combine, kernels.prefill):
        signature: dict[str, str] = {}
        for name in kernel.arg_names:
            if name in numbers:
                signature[name] = "constexpr"
            elif name in (*pointers, "query", "keys", "values", "out", "sinks"):
                signature[name] = "*" + pointers.get(name, dtype)
            else:
                signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
        fixed = {name: value for name, value in numbers.items() if name in kernel.arg_names}
        divisible = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if signature[name] == "i32" or signature[name].startswith("*")
        }
        source = ASTSource(kernel, signature, constexprs=fixed, attrs=divisible)
        warps = 8 if kernel is kernels.prefill and _rows(tile) == 128 else 4
        options = {"num_warps": warps, "num_stages": 2}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"]
        assert made.metadata.shared <= 99 << 10


def agrees(need: LayerNeed, block_size: int, rows: list[tuple[int, int]], dtype: torch.dtype, seed: int = 0) -> None:
    made = mix(need, block_size, dtype, rows, seed)
    worst = float((made.found(BACKEND).double() - made.expected()).abs().max())
    assert worst < TOLERANCE[dtype], (need, block_size, rows)


MIXED = [(0, 1), (40, 1), (0, 19), (70, 43), (130, 1), (15, 2)]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 32])
def test_mixed_batches(block_size: int, dtype: torch.dtype) -> None:
    agrees(LayerNeed(4, 2, 32, 32), block_size, MIXED, dtype)


@interpreted
@pytest.mark.parametrize(
    "need",
    [
        (4, 4, 16, 16),
        (6, 2, 24, 24),
        (8, 1, 40, 16),
        (2, 2, 80, 80),
        (18, 1, 16, 16),
        (4, 2, 16, 16, 1),
        (4, 2, 16, 16, 17),
        (4, 2, 16, 16, 64),
        (4, 2, 16, 16, None, 3.0),
        (4, 2, 16, 16, None, None, True),
        (4, 2, 16, 16, 20, 2.0, True),
    ],
    ids=str,
)
def test_what_layers_need(need: Any) -> None:
    agrees(LayerNeed(*need), 16, MIXED, torch.float32)


@interpreted
def test_long_contexts_are_split_and_put_together() -> None:
    from pdctl.engine.model.attention.triton_paged import TritonBackend

    made = mix(LayerNeed(4, 2, 16, 16, has_sinks=True), 16, torch.float32, [(700, 1), (0, 1), (333, 1)])
    expected = made.expected()
    for units in (1, 8, 64):
        found = made.found(TritonBackend(units, is_interpreted=True))
        assert float((found.double() - expected).abs().max()) < 2e-5, units


@interpreted
@pytest.mark.parametrize("seed", range(8))
def test_random_mixes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    rows = [
        (number(0, 150), 1 if number(0, 1) else number(1, 80))
        for _ in range(number(1, 6))
    ]
    kv_heads = number(1, 3)
    need = LayerNeed(
        kv_heads * number(1, 5), kv_heads, number(3, 40), number(3, 40),
        number(1, 100) if number(0, 1) else None, float(number(1, 9)) if number(0, 1) else None, bool(number(0, 1)),
    )  # fmt: skip
    agrees(need, 1 << number(3, 6), rows, torch.float32, seed)
