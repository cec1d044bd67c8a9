"""A process that is started for one answer is not waited for longer than told, and leaves nothing."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import psutil
import pytest

from pdctl.host.processes import subprocesses
from pdctl.host.processes.subprocesses import last_words, started

pytestmark = pytest.mark.anyio
# Prints the pid of a child that holds its pipes, and sleeps.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=%s)
print(child.pid, flush=True)
time.sleep(600)
"""


async def child_of(process: asyncio.subprocess.Process) -> psutil.Process:
    assert process.stdout is not None
    return psutil.Process(int(await process.stdout.readline()))


async def test_what_a_process_has_started_ends_with_it() -> None:
    async with asyncio.timeout(60):
        async with started([sys.executable, "-c", PARENT % False]) as process:
            child = await child_of(process)
        await asyncio.to_thread(psutil.wait_procs, [child], 30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


async def test_nobody_waits_for_one_that_holds_its_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process in a driver's call does, that no signal ends."""
    monkeypatch.setattr(subprocesses, "_END_S", 0.2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    async with asyncio.timeout(60):
        async with started([sys.executable, "-c", PARENT % True]) as process:
            child = await child_of(process)
        try:
            assert child.is_running()
            assert process.returncode is not None
            await asyncio.sleep(0)
            assert len(list(Path("/proc/self/fd").iterdir())) <= before, "its pipes are closed"
        finally:
            child.kill()


async def test_its_last_words_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "_END_S", 0.2)
    async with asyncio.timeout(60):
        async with started([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
            assert await last_words(process) == "exit code None"
    async with started([sys.executable, "-c", "import sys; sys.exit('first\\nno room')"]) as process:
        monkeypatch.setattr(subprocesses, "_END_S", 60.0)
        assert await last_words(process) == "no room"
    assert process.returncode == 1
