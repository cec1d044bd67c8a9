"""Norms, gates, rotations and the largest logit by the compiled kernels: as PyTorch computes them, row by row."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.native.modules import ACTIVATIONS
from pdctl.engine.model.native.rows import DTYPES, Activation, Kernels, kernels
from pdctl.engine.model.sampler import sample

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
SIZES = (1, 5, 16, 33, 64, 256, 641)
# bfloat16: numbers next to each other, because float32 before it may differ by a rounding.
ALLOWED = {torch.float32: 3e-6, torch.bfloat16: 2**-7}


def kernels_of(dtype: torch.dtype) -> Kernels:
    found = kernels(dtype)
    assert found is not None
    return found


def some(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.2).to(dtype)


def layouts(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows of this size as models have them: packed, as a part of wider rows, by heads."""
    wide = some(1, 7, 3 * size + 2, dtype=dtype)
    return [
        some(4, size, dtype=dtype),
        some(1, 7, size, dtype=dtype),
        wide[..., size : 2 * size],
        wide[..., 1 : 1 + 3 * size].view(1, 7, 3, size).transpose(1, 2),
        wide[..., 1 : 1 + 3 * size].view(1, 7, 3, size),
        some(1, 3, 7, size, dtype=dtype),
        some(2, 3, 7, size, dtype=dtype),
    ]


def assert_close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert found is not None
    assert found.dtype is expected.dtype
    assert found.shape == expected.shape
    allowed = ALLOWED[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_norms(size: int, dtype: torch.dtype) -> None:
    weight = some(size, dtype=torch.float32)
    for rows in layouts(size, dtype):
        wide = rows.float()
        quotient = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        assert_close(kernels_of(dtype).normalize(rows, weight, 1e-5, False), (quotient * weight).to(dtype))
        early = kernels_of(dtype).normalize(rows, weight, 1e-5, True)
        assert_close(early, (quotient.to(dtype).float() * weight).to(dtype))


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gates(size: int, dtype: torch.dtype, activation: Activation) -> None:
    for both in (some(5, 2 * size, dtype=dtype), some(1, 5, 2 * size + 3, dtype=dtype)):
        both *= 4
        gate, up = both[..., :size], both[..., size : 2 * size]
        expected = (ACTIVATIONS[activation](gate.float()) * up.float()).to(dtype)
        assert_close(kernels_of(dtype).gate(gate, up, activation), expected)


def test_gates_of_extreme_numbers() -> None:
    gate = torch.tensor([[0.0, -0.0, 1e4, -1e4, 88.0, -88.0, 1e30, -1e12, torch.inf, torch.nan, 1e-30]])
    for activation, known in ACTIVATIONS.items():
        found = kernels_of(torch.float32).gate(gate, torch.ones_like(gate), activation)
        assert found is not None
        if activation is Activation.RELU:
            # What is not less than 0 stays, as NaN does in PyTorch.
            assert torch.isnan(found[0, 9])
        torch.testing.assert_close(found, known(gate), rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 10, 16, 64, 90, 256])
def test_rotations(size: int, dtype: torch.dtype) -> None:
    cos, sin = some(1, 7, size, dtype=dtype), some(1, 7, size, dtype=dtype) ** 2
    for rows in layouts(size, dtype):
        if rows.shape[0] == 1 and rows.dim() == 4 and rows.shape[2] == 7:
            halves = torch.cat([-rows[..., size // 2 :], rows[..., : size // 2]], -1).float()
            expected = (rows.float() * cos.float() + halves * sin.float()).to(dtype)
            assert_close(kernels_of(dtype).rotate(rows, cos, sin), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 63, 1000, 1024, 1025, 5001])
def test_the_largest_logit(vocab: int, dtype: torch.dtype) -> None:
    functions = kernels_of(dtype)
    rows = some(40, vocab + 3, dtype=dtype)[:, :vocab]
    rows[0] = -torch.inf
    rows[1] = 7
    # Every place may be that of the largest one.
    for row in range(2, 40):
        rows[row, row * 131 % vocab] = 9
    found = functions.largest(rows)
    assert found is not None
    assert found.tolist() == [row.tolist().index(row.max()) for row in rows.float()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 20, 1070, 1074])
def test_a_nan_is_found(at: int, dtype: torch.dtype) -> None:
    rows = some(3, 1075, dtype=dtype)
    rows[1, at] = torch.nan
    found = kernels_of(dtype).largest(rows)
    assert found is not None
    assert (found < 0).tolist() == [False, True, False]
    assert sample(rows, [(Sampling(1, temperature=0.0), 5)] * 3) == rows.float().argmax(-1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_copied_to_their_slots(dtype: torch.dtype) -> None:
    plane, slots = torch.zeros(20, 3, 8, dtype=dtype), torch.tensor([4, 19, 0, 7, 5])
    wide = some(1, 5, 30, dtype=dtype)
    for rows in (some(5, 3, 8, dtype=dtype), wide[..., 2:26].view(1, 5, 3, 8).transpose(1, 2)[0].transpose(0, 1)):
        expected = plane.clone().index_copy_(0, slots, rows)
        assert kernels_of(dtype).place(rows, plane, slots)
        assert torch.equal(plane, expected)


def test_no_row_is_copied_beyond_a_plane() -> None:
    plane, rows, functions = torch.zeros(6, 1, 8)[1:5], torch.ones(2, 1, 8), kernels_of(torch.float32)
    for slot in (-1, 4):
        with pytest.raises(IndexError, match=f"slot {slot} of 4"):
            functions.place(rows, plane, torch.tensor([2, slot]))
    assert not functions.place(rows, torch.zeros(4, 1, 9), torch.tensor([0, 1]))
    assert not functions.place(rows, torch.zeros(4, 8, 2)[..., :1].transpose(1, 2), torch.tensor([0, 1]))


def test_layouts_that_they_do_not_take() -> None:
    functions = kernels_of(torch.float32)
    weight, two = torch.ones(8), torch.randn(2, 3, 4, 8)
    assert functions.normalize(two.transpose(1, 2), weight, 1e-6, False) is None
    assert functions.normalize(two[:, 0], weight, 1e-6, False) is None
    assert functions.normalize(torch.randn(8, 5).t(), weight, 1e-6, False) is None
    assert functions.gate(two, two, Activation.SILU) is None
    assert functions.gate(torch.randn(5, 8), torch.randn(1, 8), Activation.SILU) is None
    assert functions.rotate(two, torch.randn(2, 4, 8), torch.randn(2, 4, 8)) is None
    assert functions.rotate(two[:1], torch.randn(1, 4, 6), torch.randn(1, 4, 6)) is None
    assert functions.rotate(two[:1, ..., :7], torch.randn(1, 4, 7), torch.randn(1, 4, 7)) is None
    assert functions.largest(torch.randn(8, 5).t()) is None
    assert kernels(torch.float16) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [33, 640])
def test_a_row_has_the_same_bits_alone(size: int, dtype: torch.dtype) -> None:
    functions, weight = kernels_of(dtype), some(size, dtype=torch.float32)
    rows, up = some(1, 9, size, dtype=dtype), some(1, 9, size + 1, dtype=dtype)[..., 1:]
    heads, cos = some(1, 9, 2, 32, dtype=dtype).transpose(1, 2), some(1, 9, 32, dtype=dtype)
    computed: list[tuple[Callable[[slice], torch.Tensor | None], int]] = [
        (lambda at: functions.normalize(rows[:, at], weight, 1e-6, False), 1),
        (lambda at: functions.gate(rows[:, at], up[:, at], Activation.GELU), 1),
        (lambda at: functions.rotate(heads[:, :, at], cos[:, at], cos[:, at]), 2),
    ]
    for compute, dim in computed:
        whole = compute(slice(None))
        assert whole is not None
        for row in range(9):
            alone = compute(slice(row, row + 1))
            assert alone is not None
            assert torch.equal(alone, whole.narrow(dim, row, 1))


def test_activations_are_those_of_pytorch() -> None:
    numbers = torch.linspace(-3, 3, 50)
    assert torch.equal(ACTIVATIONS[Activation.GELU](numbers), functional.gelu(numbers, approximate="tanh"))
    assert not torch.allclose(ACTIVATIONS[Activation.GELU](numbers), functional.gelu(numbers), atol=1e-5)
