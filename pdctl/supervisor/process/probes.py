"""Probes of one process: readiness, liveness, progress and function. Each probe has a deadline.

The engine kind or the topology defines when a process is ready: a port accepts, a path answers 200, or a line is in
the log. From then on it must answer (liveness), and its token count must advance while requests run (progress: only
this probe finds a hung core behind a front that answers 200). If configured, an idle engine must also generate a token
(functional).
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from pdctl.adapters import Progress
from pdctl.net.http_client import ConnectionPool, Unreachable, header_lines
from pdctl.net.identity import ContextFactory
from pdctl.net.pauses import Sleeper
from pdctl.plan import Probe

_JSON = {"content-type": "application/json"}
_FUNCTIONAL_S = 60.0
# How often a disabled probe checks whether it was enabled, seconds.
_OFF_S = 5.0
# Bytes at the end of a log that are searched for the ready line.
_LOG_TAIL = 1 << 20


@dataclass(frozen=True, slots=True)
class Cadence:
    """Intervals and limits of the probes, in seconds; 0 disables a probe. `failures`: failed probes in a row."""

    liveness_s: float
    failures: int
    progress_s: float
    functional_s: float


class Prober:
    """Probes one incarnation of one process. `secret`: sent with each request, "" for none; `read_progress` parses what
    its state path answers; raises ValueError. `tls`: for https probes."""

    def __init__(
        self,
        probe: Probe,
        log: Path,
        secret: str,
        read_progress: Callable[[bytes], Progress],
        tls: ContextFactory | None = None,
    ) -> None:
        self._probe = probe
        self._tls = tls
        self._read_progress = read_progress
        self._log = log
        self._headers = header_lines({**({"authorization": f"Bearer {secret}"} if secret else {}), **_JSON})
        self._pools: dict[str, ConnectionPool] = {}
        self._done = (-1, -1)
        self._stuck_since = 0.0

    # -- readiness -----------------------------------------------------------------------------------------

    async def until_ready(self) -> bool:
        """Wait until the process is ready. False if the startup deadline passed."""
        kind, _, rest = self._probe.ready.partition(":")
        asks = {"tcp": self._accepts, "log": self._logged, "http": self._answers, "https": self._answers}
        ask = asks.get(kind, _at_once)
        deadline = time.monotonic() + self._probe.startup_s
        try:
            while time.monotonic() < deadline:
                if await ask(self._probe.ready if kind.startswith("http") else rest):
                    return True
                await asyncio.sleep(self._probe.interval_s)
        finally:
            self._close()
        return False

    async def _accepts(self, address: str) -> bool:
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(self._probe.timeout_s):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def _logged(self, pattern: str) -> bool:
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, self._log.stat().st_size - _LOG_TAIL))
                text = file.read().decode(errors="replace")
        except OSError:
            return False
        return re.search(pattern, text, re.MULTILINE) is not None

    async def _answers(self, url: str) -> bool:
        try:
            if await self._get(url) is None:
                return False
            return not self._probe.ready_generates or await self._generate() == 200
        except Unreachable:
            return False  # not listening yet; an exit is detected elsewhere

    # -- liveness ------------------------------------------------------------------------------------------

    async def until_dead(self, cadence: Callable[[], Cadence]) -> str:
        """Return the reason when the process counts as dead. Never returns if there is nothing to probe.

        `cadence` is called before each probe: it may change while the process runs.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(_forever(self._liveness(cadence)))]
                if self._probe.generate:
                    asked.append(tasks.create_task(_forever(self._functional(cadence))))
                done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                reason = next(iter(done)).result()
                for task in asked:
                    task.cancel()
            return reason
        finally:
            self._close()

    async def _liveness(self, cadence: Callable[[], Cadence]) -> str | None:
        """The reason why the process counts as dead; None if there is nothing to probe."""
        if not self._probe.alive and not self._probe.state:
            return None
        missed, sleeper = 0, Sleeper()
        # Spread the probes, so that two hundred processes are not probed at the same moment.
        await asyncio.sleep(cadence().liveness_s * random.random())  # noqa: S311 - spreading, no secret
        while True:
            now = cadence()
            address = self._probe.state if now.progress_s and self._probe.state else self._probe.alive
            if not now.liveness_s or not address:
                missed = 0
                await asyncio.sleep(_OFF_S)
                continue
            try:
                body = await self._ask(address)
                missed = 0 if body is not None else missed + 1
                if body is not None and (stuck := self._progress(body, now.progress_s)):
                    return stuck
                said = "answers with an error"
            except Unreachable as failure:
                missed += 1
                said = str(failure)
            if missed >= now.failures:
                return f"not alive: {missed} probes in a row failed ({said})"
            if await sleeper.overslept(now.liveness_s):
                missed, self._stuck_since = 0, time.monotonic()

    def _progress(self, body: bytes, progress_s: float) -> str | None:
        if not progress_s or not self._probe.state:
            return None
        try:
            state = self._read_progress(body)
        except ValueError:
            return None
        if state.silent_s > progress_s:
            return f"hung: its core has not answered for {state.silent_s:.0f} s"
        now, done = time.monotonic(), (state.tokens_total, state.steps_total)
        if state.running == 0 or done != self._done:
            self._done, self._stuck_since = done, now
            return None
        silent = now - self._stuck_since
        return (
            f"hung: {state.running} requests are running, but no token for {silent:.0f} s"
            if silent > progress_s
            else None
        )

    async def _functional(self, cadence: Callable[[], Cadence]) -> str | None:
        """Generate one token in an idle engine; the progress probe covers a busy one."""
        while True:
            period = cadence().functional_s
            await asyncio.sleep((period or _OFF_S) * (0.5 + random.random() / 2))  # noqa: S311 - spreading
            if not period:
                continue
            try:
                if await self._is_busy():
                    continue
                answer = await self._generate()
            except (Unreachable, ValueError) as failure:
                return f"not alive: a one-token request failed ({failure})"
            if answer >= 500:
                return f"not alive: a one-token request was answered with {answer}"

    # -- parts ---------------------------------------------------------------------------------------------

    async def _generate(self) -> int:
        """The status of the answer to a one-token request. Raises Unreachable."""
        pool, path = self._at(self._probe.generate)
        body = self._probe.generate_body.encode()
        return (await pool.request("POST", path, self._headers, body, timeout_s=_FUNCTIONAL_S)).status

    async def _is_busy(self) -> bool:
        """Whether requests run. Raises Unreachable, ValueError."""
        body = await self._get(self._probe.state) if self._probe.state else None
        return body is not None and self._read_progress(body).running > 0

    async def _ask(self, address: str) -> bytes | None:
        """The answer of a liveness probe, None for an error. Raises Unreachable."""
        if not address.startswith("tcp:"):
            return await self._get(address)
        if await self._accepts(address.removeprefix("tcp:")):
            return b""
        raise Unreachable(f"{address.removeprefix('tcp:')} accepts no connection")

    async def _get(self, url: str) -> bytes | None:
        """The body of an answer with status 200, else None. Raises Unreachable."""
        pool, path = self._at(url)
        answer = await pool.request("GET", path, self._headers, timeout_s=self._probe.timeout_s)
        return answer.body if answer.status == 200 else None

    def _at(self, url: str) -> tuple[ConnectionPool, str]:
        scheme, _, rest = url.partition("://")
        address, _, path = rest.partition("/")
        if address not in self._pools:
            host, _, port = address.rpartition(":")
            tls = self._tls if scheme == "https" else None
            self._pools[address] = ConnectionPool(host.strip("[]"), int(port), tls=tls)
        return self._pools[address], f"/{path}"

    def _close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


async def _at_once(_: str) -> bool:
    return True


async def _forever(asked: Awaitable[str | None]) -> str:
    """Wait for a probe; one with nothing to probe never ends."""
    reason = await asked
    if reason is None:
        await asyncio.get_running_loop().create_future()
    assert reason is not None
    return reason
