"""Is it ready, is it alive, does it get on: one process asked from outside, within deadlines.

Ready is what its kind or the topology says: a port that accepts, a path that answers 200, a line in its log. From then
on it must answer (liveness), its tokens must advance while requests run (progress: a hung core behind a front that
answers 200 is caught by this alone), and where asked for, a token must come out of an idle engine (functional).
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pdctl.net.http_client import ConnectionPool, Unreachable, header_lines
from pdctl.plan import Probe

_JSON = {"content-type": "application/json"}
_ONE_TOKEN = msgspec.json.encode({"prompt": [1], "max_tokens": 1, "temperature": 0})
_FUNCTIONAL_S = 60.0
# How soon a probe that is turned off notices that it is not any more.
_OFF_S = 5.0
# Bytes of a log looked at for its ready line.
_LOG_TAIL = 1 << 20


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often and how patiently. Seconds; 0 turns a probe off."""

    liveness_s: float
    failures: int
    progress_s: float
    functional_s: float


class _State(msgspec.Struct):
    """What a progress probe needs of an engine's state; kinds leave out what they do not know."""

    running: int = 0
    tokens_total: int = 0
    steps_total: int = 0
    silent_s: float = 0.0


class Prober:
    """Asks one incarnation of one process."""

    def __init__(self, probe: Probe, log: Path, secret: str) -> None:
        self._probe = probe
        self._log = log
        self._headers = header_lines({"authorization": f"Bearer {secret}", **_JSON})
        self._pools: dict[str, ConnectionPool] = {}
        self._done = (-1, -1)
        self._stuck_since = 0.0

    # -- readiness -----------------------------------------------------------------------------------------

    async def until_ready(self) -> bool:
        """False when it took longer than it may."""
        kind, _, rest = self._probe.ready.partition(":")
        ask = {"tcp": self._accepts, "log": self._logged, "http": self._answers}.get(kind, _at_once)
        deadline = time.monotonic() + self._probe.startup_s
        try:
            while time.monotonic() < deadline:
                if await ask(self._probe.ready if kind == "http" else rest):
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
            return await self._get(url) is not None
        except Unreachable:
            return False  # not listening yet; its exit, if it comes to that, is noticed elsewhere

    # -- from then on --------------------------------------------------------------------------------------

    async def until_dead(self, cadence: Callable[[], Cadence]) -> str:
        """Return when it must be given up, with the reason; never, where nothing is to be asked.

        `cadence` is asked before each probe: it may change while the process runs.
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
        """None when there is nothing to ask."""
        if not self._probe.alive and not self._probe.state:
            return None
        missed = 0
        # Spread, so that two hundred processes are not asked in one moment.
        await asyncio.sleep(cadence().liveness_s * random.random())  # noqa: S311 - spreading, no secret
        while True:
            now = cadence()
            address = self._probe.state if now.progress_s and self._probe.state else self._probe.alive
            if not now.liveness_s or not address:
                missed = 0
                await asyncio.sleep(_OFF_S)
                continue
            try:
                body = await self._get(address)
                missed = 0 if body is not None else missed + 1
                if body is not None and (stuck := self._progress(body, now.progress_s)):
                    return stuck
                said = "answers with an error"
            except Unreachable as failure:
                missed += 1
                said = str(failure)
            if missed >= now.failures:
                return f"not alive: {missed} probes in a row failed ({said})"
            await asyncio.sleep(now.liveness_s)

    def _progress(self, body: bytes, progress_s: float) -> str | None:
        if not progress_s or not self._probe.state:
            return None
        try:
            state = msgspec.json.decode(body, type=_State)
        except msgspec.DecodeError:
            return None
        if state.silent_s > progress_s:
            return f"hung: its core has not answered for {state.silent_s:.0f} s"
        now, done = time.monotonic(), (state.tokens_total, state.steps_total)
        if state.running == 0 or done != self._done:
            self._done, self._stuck_since = done, now
            return None
        silent = now - self._stuck_since
        return f"hung: {state.running} requests run, and no token for {silent:.0f} s" if silent > progress_s else None

    async def _functional(self, cadence: Callable[[], Cadence]) -> str | None:
        """A token through the engine; when it is busy, its progress says the same."""
        while True:
            period = cadence().functional_s
            await asyncio.sleep((period or _OFF_S) * (0.5 + random.random() / 2))  # noqa: S311 - spreading
            if not period:
                continue
            try:
                busy = msgspec.json.decode(await self._get(self._probe.state) or b"{}", type=_State).running > 0
                if busy:
                    continue
                pool, path = self._at(self._probe.generate)
                answer = await pool.request("POST", path, self._headers, _ONE_TOKEN, timeout_s=_FUNCTIONAL_S)
            except (Unreachable, msgspec.DecodeError) as failure:
                return f"not alive: a one-token request failed ({failure})"
            if answer.status >= 500:
                return f"not alive: a one-token request was answered with {answer.status}"

    # -- parts ---------------------------------------------------------------------------------------------

    async def _get(self, url: str) -> bytes | None:
        """The body of a 200, or None. Raises Unreachable."""
        pool, path = self._at(url)
        answer = await pool.request("GET", path, self._headers, timeout_s=self._probe.timeout_s)
        return answer.body if answer.status == 200 else None

    def _at(self, url: str) -> tuple[ConnectionPool, str]:
        address, _, path = url.removeprefix("http://").partition("/")
        if address not in self._pools:
            host, _, port = address.rpartition(":")
            self._pools[address] = ConnectionPool(host.strip("[]"), int(port))
        return self._pools[address], f"/{path}"

    def _close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


async def _at_once(_: str) -> bool:
    return True


async def _forever(asked: Awaitable[str | None]) -> str:
    """A probe that has nothing to ask never ends."""
    reason = await asked
    if reason is None:
        await asyncio.get_running_loop().create_future()
    assert reason is not None
    return reason
