"""The doctor for the page: one run at a time, only when somebody asks, and never for ever."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdctl.supervisor.dashboard import findings
from pdctl.supervisor.dashboard.findings import DoctorRuns
from pdctl.supervisor.dashboard.messages import Findings
from tests.supervisor.dashboard.loop import in_loop


def programs(monkeypatch: pytest.MonkeyPatch, *scripts: str) -> list[list[str]]:
    """Instead of the doctor, these run, one after the other. Returns the doctor's command lines."""
    argvs: list[list[str]] = []
    waiting = list(scripts)

    def start(argv: list[str]) -> subprocess.Popen[bytes]:
        argvs.append(argv)
        return subprocess.Popen([sys.executable, "-c", waiting.pop(0)], stdout=subprocess.PIPE)

    monkeypatch.setattr(findings, "_started", start)
    return argvs


@asynccontextmanager
async def running(source: str = "") -> AsyncIterator[DoctorRuns]:
    doctor = DoctorRuns(lambda: source)
    async with asyncio.timeout(300), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(doctor.run_forever())
        yield doctor
        task.cancel()


async def ended(doctor: DoctorRuns) -> Findings:
    while doctor.last.running:
        await asyncio.sleep(0.01)
    return doctor.last


FOUND = 'print(\'{"findings": [{"id": "gpu.none"}], "more": 1}\')'


@in_loop
async def test_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    argvs = programs(monkeypatch, FOUND, FOUND)
    async with running("/etc/pdctl.toml") as doctor:
        assert doctor.ask(again=False).running
        assert doctor.ask(again=True).running
        found = await ended(doctor)
        assert [bytes(one) for one in found.findings] == [b'{"id": "gpu.none"}']
        assert found.at > 0
        # They are new enough.
        assert not doctor.ask(again=False).running
        assert len(argvs) == 1
        assert argvs[0][-3:] == ["--json", "--against", "/etc/pdctl.toml"]
        assert doctor.ask(again=True).running
        await ended(doctor)
        assert len(argvs) == 2


@pytest.mark.parametrize("script", ["", "print('no')", "import sys; sys.exit(1)", "print('[]')", "print('{}')"])
@in_loop
async def test_a_doctor_that_says_nothing(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    programs(monkeypatch, script)
    async with running() as doctor:
        doctor.ask(again=True)
        assert "did not print its findings" in (await ended(doctor)).error


@in_loop
async def test_a_doctor_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, "import time; time.sleep(1000)")
    monkeypatch.setattr(findings, "_DEADLINE_S", 0.1)
    async with running() as doctor:
        doctor.ask(again=True)
        assert "did not end" in (await ended(doctor)).error


@in_loop
async def test_the_end_of_the_service_ends_a_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    argvs = programs(monkeypatch, "import time; time.sleep(1000)")
    async with running() as doctor:
        doctor.ask(again=True)
        while not argvs:
            await asyncio.sleep(0.01)
