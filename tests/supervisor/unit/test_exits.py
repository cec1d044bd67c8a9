"""Why a process ended, from what it said and from the kernel log."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.supervisor.unit.exits import Ended, KernelLog, gpu_error, report, told_of
from pdctl.supervisor.unit.lifecycle import Exit

ENDED = Ended(
    "decode-0", 77, "e-1", time.monotonic(), Exit(1, None), None, "", False,
    words="the GPU failed in a step: CUDA error: unspecified launch failure", uses_gpus=True,
)  # fmt: skip
XID = "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."


class Kernel(KernelLog):
    """These lines, of now."""

    def __init__(self, *lines: str) -> None:
        super().__init__(Path("/nonexistent"))
        self._lines = list(lines)

    def lines(self, window_s: float = 10.0) -> list[str]:
        return self._lines


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ""),
        (["mlx5_core 0000:12:00.0: health poll failed"], ""),
        ([XID], "the driver reports Xid 79 on GPU 0000:3b:00"),
        ([XID, "NVRM: Xid (0000:5e:00): 31, pid=77, name=python"], "the driver reports Xid 31 on GPU 0000:5e:00"),
    ],
)
def test_the_last_error_of_a_gpu(lines: list[str], said: str) -> None:
    assert gpu_error(lines) == said


def test_an_engine_on_a_gpu_ends_with_what_it_said_and_what_the_driver_says(tmp_path: Path) -> None:
    found = report(ENDED, tmp_path / "log", None, Kernel(XID))
    assert found.reason == (
        "exited with code 1: the GPU failed in a step: CUDA error: unspecified launch failure; "
        "the driver reports Xid 79 on GPU 0000:3b:00"
    )
    assert found.kernel == (XID,)


def test_a_killed_engine_that_said_nothing_ends_with_what_the_driver_says(tmp_path: Path) -> None:
    killed = replace(ENDED, exit=Exit(None, 6), words="")
    reason = report(killed, tmp_path / "log", None, Kernel(XID)).reason
    assert reason.endswith(": the driver reports Xid 79 on GPU 0000:3b:00")


@pytest.mark.parametrize("other", [replace(ENDED, uses_gpus=False), replace(ENDED, expected=True)])
def test_processes_that_it_does_not_concern(other: Ended, tmp_path: Path) -> None:
    assert report(other, tmp_path / "log", None, Kernel(XID)).reason == told_of(other).reason


@pytest.mark.parametrize(
    ("exit_", "by_us", "expected", "of_itself"),
    [
        (Exit(None, 11), "", False, True),
        (Exit(1, None), "", False, True),
        (Exit(None, 9), "pdctl, with SIGKILL (hung)", False, True),
        (Exit(None, 9), "", False, False),
        (Exit(None, 15), "", False, False),
        (Exit(0, None), "pdctl, with SIGTERM", True, False),
        (Exit(None, None), "", False, False),
    ],
)
def test_a_signal_from_outside_is_not_a_crash(exit_: Exit, by_us: str, expected: bool, of_itself: bool) -> None:
    assert replace(ENDED, exit=exit_, by_us=by_us, expected=expected).of_itself is of_itself
