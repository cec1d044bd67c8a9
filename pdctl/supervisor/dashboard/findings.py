"""The doctor's findings for the page. The doctor is another program: it runs when a page asks, one at a time."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable

import msgspec

from pdctl.host import program
from pdctl.supervisor.dashboard.messages import Findings

_DEADLINE_S = 120.0
# A page gets findings that are not older than this without a new run, seconds.
_FRESH_S = 300.0
_MOST_BYTES = 4 * 2**20


class _Report(msgspec.Struct):
    findings: list[msgspec.Raw]


class DoctorRuns:
    """`source`: the topology file, "" for none."""

    def __init__(self, source: Callable[[], str]) -> None:
        self.last = Findings()
        self._source = source
        self._due = asyncio.Event()

    def ask(self, again: bool) -> Findings:
        """What is known now. Begins a run if it is old, or if it is wanted `again`."""
        if not self.last.running and (again or time.time() - self.last.at > _FRESH_S):
            self.last = msgspec.structs.replace(self.last, running=True)
            self._due.set()
        return self.last

    async def run_forever(self) -> None:
        """Run the doctor whenever somebody has asked, until cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            self.last = await self._run()

    async def _run(self) -> Findings:
        source = self._source()
        argv = program.pdctl("doctor", "--json", *(["--against", source] if source else []))
        try:
            with _started(argv) as process:
                try:
                    async with asyncio.timeout(_DEADLINE_S):
                        out, _ = await asyncio.to_thread(process.communicate)
                finally:
                    process.kill()
        except TimeoutError:
            return Findings(time.time(), error=f"The doctor did not end within {_DEADLINE_S:g} seconds.")
        except OSError as failure:
            return Findings(time.time(), error=f"The doctor cannot be started: {failure}.")
        return _parsed(out)


def _started(argv: list[str]) -> subprocess.Popen[bytes]:
    """Not asyncio's: the supervisor reaps every child that is not a unit, so an exit code may be lost."""
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _parsed(out: bytes) -> Findings:
    if len(out) > _MOST_BYTES:
        return Findings(time.time(), error="The doctor has too many findings for a page: see pdctl doctor.")
    try:
        return Findings(time.time(), findings=tuple(msgspec.json.decode(out, type=_Report).findings))
    except msgspec.DecodeError:
        return Findings(time.time(), error="The doctor did not print its findings: see pdctl doctor.")
