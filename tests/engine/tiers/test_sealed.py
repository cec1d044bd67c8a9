from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.tiers.sealed import HEADER_BYTES, Sealed

NAME, OTHER = b"n" * 32, b"o" * 32
ROW = np.arange(64, dtype=np.uint8)
SEALED = Sealed("secret", 64)


def test_what_was_sealed_is_opened() -> None:
    opened = SEALED.opened(NAME, SEALED.seal(NAME, ROW))
    assert opened is not None
    assert (opened == ROW).all()


@given(st.integers(0, HEADER_BYTES + 63), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(at: int, change: int) -> None:
    value = bytearray(SEALED.seal(NAME, ROW))
    value[at] ^= change
    assert SEALED.opened(NAME, bytes(value)) is None


@pytest.mark.parametrize(
    "value",
    [b"", b"x", SEALED.seal(NAME, ROW)[:-1], SEALED.seal(NAME, ROW) + b"x", bytes(HEADER_BYTES + 64)],
    ids=["empty", "short", "cut", "longer", "zeros"],
)
def test_what_is_not_a_block_is_not_opened(value: bytes) -> None:
    assert SEALED.opened(NAME, value) is None


def test_a_block_is_opened_under_its_own_name_only() -> None:
    assert SEALED.opened(OTHER, SEALED.seal(NAME, ROW)) is None


def test_who_does_not_know_the_secret_seals_nothing() -> None:
    assert SEALED.opened(NAME, Sealed("guess", 64).seal(NAME, ROW)) is None


def test_another_size_is_another_block() -> None:
    """Of an engine with other layers, whose names could only be equal by a fault."""
    assert Sealed("secret", 32).opened(NAME, SEALED.seal(NAME, ROW)) is None
