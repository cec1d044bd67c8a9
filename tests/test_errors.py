"""Failures of nested task groups."""

from __future__ import annotations

from pdctl.errors import PdctlError, first_of


def test_the_first_failure_is_found_however_deep_it_is() -> None:
    failure = PdctlError("the port is taken")
    assert first_of(ExceptionGroup("one", [failure])) is failure
    nested = ExceptionGroup("b", [ExceptionGroup("c", [failure])])
    assert first_of(ExceptionGroup("a", [nested, PdctlError("another")])) is failure
