"""Waiting for descriptors: those of a process with many open files have high numbers."""

from __future__ import annotations

import os
import resource

from pdctl.host.processes.waiting import readable


def test_a_descriptor_of_any_number_is_waited_for() -> None:
    low, end = os.pipe()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    high = 2000
    try:
        os.dup2(low, high)
        assert readable([high], 0) == []
        os.write(end, b"x")
        assert readable([low, high], None) == [low, high]
        os.close(end)
        assert readable([high], 10) == [high]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(high)
        os.close(low)
