"""A short run of the chaos suite. `scripts/slow` shows that it detects disabled safeguards."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.service import REPOSITORY

pytestmark = pytest.mark.e2e


def chaos(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.chaos.run", *words]
    return subprocess.run(argv, cwd=REPOSITORY, env={**os.environ}, capture_output=True, text=True, timeout=560)


def test_every_promise_holds_under_chaos() -> None:
    done = chaos("--faults", "15", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 violations" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("safeguard", ["commit", "quarantine", "witness"])
def test_chaos_notices_a_missing_safeguard(safeguard: str) -> None:
    done = chaos("--faults", "150", "--seed", "1", "--sabotage", safeguard)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fails, as it must" in done.stdout
