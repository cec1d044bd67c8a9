"""Injects hundreds of faults into a running service and checks all promises after each.

    scripts/chaos [--seed 1] [--faults 500] [--transport shm] [--sabotage commit|quarantine|witness]

Real processes and real kills. Failpoints are injected into the engines from outside (tests/chaos/inject). With
--sabotage one safeguard is disabled, and the run must fail: this shows that the suite works."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from pdctl.control_api import Lease, MeasuredProcess
from tests.chaos.load import DEADLINE_S, Load, questions
from tests.chaos.watch import Watch
from tests.service import Run, Service, running, topology

LEASE_S = 2.0
ENGINES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
_INJECT = Path(__file__).parent / "inject"

# The failpoints and their possible actions.
_CALLS = [f"{when}_{call}" for call in ("claim", "commit", "release", "renew", "offer") for when in ("before", "after")]
_FRONT_POINTS = {"decode": _CALLS[:8], "prefill": ["after_grant", "before_free", "before_offer", "after_offer"]}
_CORE_POINTS = ["before_read", "after_read"]


class ChaosRun(Run):
    """The directory of a service with processes that load the failpoints."""

    sabotage = ""

    @property
    def env(self) -> dict[str, str]:
        return {**super().env, "PYTHONPATH": str(_INJECT), "CHAOS_DIR": str(self.folder / "chaos"),
                "CHAOS_SABOTAGE": self.sabotage}  # fmt: skip


class Chaos:
    """One run: load, faults by seed, checks after each fault."""

    def __init__(self, service: Service, load: Load, watch: Watch, seed: int, weights: dict[str, float]) -> None:
        self.service = service
        self.load = load
        self.watch = watch
        self.chance = random.Random(seed)
        self.folder = service.run.folder / "chaos"
        self.done: Counter[str] = Counter()
        self.http = httpx.AsyncClient(trust_env=False)
        self.weights = weights

    async def run(self, faults: int, clients: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(self.load.client(number))
            acts = self._acts()
            shown = time.monotonic()
            while sum(self.done.values()) < faults and not self._violations():
                name = self.chance.choices(list(acts), [self.weights.get(act, 1.0) for act in acts])[0]
                if await acts[name]():
                    self.done[name] += 1
                await self.watch.check(self.http)
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    self.watch.violations += crashes(self.service.run)
                    print(f"  {sum(self.done.values())} faults, {dict(self.load.counts)}", file=sys.stderr, flush=True)
            self.load.stopping = True
        await self.http.aclose()

    def _violations(self) -> list[str]:
        return self.load.violations + self.watch.violations

    def _acts(self) -> dict[str, Callable[[], Awaitable[bool]]]:
        return {
            "failpoint": self._failpoint,
            "late read": lambda: self._armed(
                self._pick("decode"), "before_read", f"late {self.chance.uniform(0.1, 0.8):.2f}"
            ),
            "lost lease": self._lost_lease,
            "freeze": self._freeze,
            "kill engine": self._kill_engine,
            "kill decode, proxy frozen": self._kill_unseen_by_the_proxy,
            "kill proxy": self._kill_proxy,
            "revoke": self._revoke,
            "revoke while read": self._revoke_while_read,
        }

    # -- faults --------------------------------------------------------------------------------------------

    async def _failpoint(self) -> bool:
        """Loss, delay, freeze or death at a named point of the hand-over."""
        role = self.chance.choice(["prefill", "decode"])
        core = role == "decode" and self.chance.random() < 0.4
        point = self.chance.choice(_CORE_POINTS if core else _FRONT_POINTS[role])
        kind = self.chance.choices(["drop", "delay", "stop", "kill"], [5, 4, 2, 1])[0]
        if point in ("after_grant", "before_free") and kind in ("drop", "delay"):
            kind = "stop"
        action = kind if kind in ("drop", "kill") else f"{kind} {self.chance.choice([0.05, 0.3, 1.0, 2.5])}"
        return await self._armed(self._pick(role), point, action)

    async def _lost_lease(self) -> bool:
        """Renewals are lost while a read is slow: the lease ends during the read."""
        name = self._pick("decode")
        if not await self._armed(name, "before_read", f"delay {LEASE_S + 1}"):
            return False
        ends = time.monotonic() + LEASE_S + 0.5
        while time.monotonic() < ends:
            (self.folder / f"{name}.before_renew").write_text("drop")
            await asyncio.sleep(0.1)
        (self.folder / f"{name}.before_renew").unlink(missing_ok=True)
        return True

    async def _freeze(self) -> bool:
        """SIGSTOP a front, a core or another rank for a while."""
        process = await self._process(self.chance.choice(ENGINES), self.chance.random() < 0.5)
        if process is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
            await asyncio.sleep(self.chance.choice([0.1, 0.5, 1.5, LEASE_S + 0.7]))
            process.resume()
        return True

    async def _kill_engine(self) -> bool:
        name = self.chance.choice(ENGINES)
        core = self.chance.random() < 0.3
        holder = await self._holder(name)
        process = await self._process(name, core)
        if process is None or holder is None:
            return False
        process.kill()
        if name.startswith("decode") and not core:
            await self.watch.no_lease_of(self.http, holder, time.monotonic())
        return True

    async def _kill_unseen_by_the_proxy(self) -> bool:
        """A decode engine dies with leases while the proxy cannot help: only the supervisor frees them."""
        name = self._pick("decode")
        holder = await self._holder(name)
        front, proxy = await self._process(name, False), await self._process("proxy", False)
        if holder is None or front is None or proxy is None:
            return False
        if not await self._armed(name, "before_read", "delay 1.5"):
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            proxy.suspend()
            front.kill()
            await self.watch.no_lease_of(self.http, holder, time.monotonic())
            proxy.resume()
        return True

    async def _kill_proxy(self) -> bool:
        holder, process = await self._holder("proxy"), await self._process("proxy", False)
        if process is None or holder is None:
            return False
        self.load.proxy_may_die = True
        process.kill()
        await self.watch.no_lease_of(self.http, holder, time.monotonic())
        return True

    async def _revoke(self) -> bool:
        """An operator revokes a lease."""
        leases = await self._leases()
        return bool(leases) and await self._revoked(self.chance.choice(leases))

    async def _revoke_while_read(self) -> bool:
        """The blocks are freed and poisoned between a reader's claim and its read."""
        name = self._pick("decode")
        if not await self._armed(name, "before_read", "delay 0.6"):
            return False
        held = [lease for lease in await self._leases() if lease.holder.startswith(f"{name}@")]
        for lease in held:
            await self._revoked(lease)
        return bool(held)

    # -- parts ---------------------------------------------------------------------------------------------

    def _pick(self, role: str) -> str:
        return self.chance.choice([name for name in ENGINES if name.startswith(role)])

    async def _armed(self, name: str, point: str, action: str) -> bool:
        """Arm a failpoint and wait until it fires; False (and disarmed) if it does not."""
        file = self.folder / f"{name}.{point}"
        file.write_text(action)
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            if not file.exists():
                return True
            await asyncio.sleep(0.01)
        try:
            file.unlink()
        except FileNotFoundError:
            return True
        return False

    async def _leases(self) -> tuple[Lease, ...]:
        return (await asyncio.to_thread(self.service.control.leases)).leases

    async def _revoked(self, lease: Lease) -> bool:
        return (await asyncio.to_thread(self.service.control.revoke, lease.id)).ok

    async def _status(self, name: str) -> MeasuredProcess:
        return await asyncio.to_thread(self.service.process, name)

    async def _holder(self, name: str) -> str | None:
        found = await self._status(name)
        return f"{name}@{found.epoch}" if found.state == "ready" else None

    async def _process(self, name: str, core: bool) -> psutil.Process | None:
        found = await self._status(name)
        if found.state != "ready" or not found.pid:
            return None
        try:
            process = psutil.Process(found.pid)
            return self._one_rank(process) if core else process
        except psutil.NoSuchProcess:
            return None

    def _one_rank(self, front: psutil.Process) -> psutil.Process | None:
        """One of the processes that share an engine's model: its core, or another rank."""
        found = [child for child in front.children(recursive=True) if {"core", "rank"} & set(child.cmdline())]
        return self.chance.choice(found) if found else None


def crashes(run: Run) -> list[str]:
    """Engines that exited by themselves: a failed assertion, or a NaN read from a freed block."""
    found = []
    for log in sorted((run.folder / "s" / "t" / "logs").glob("*")):
        for line in log.read_text(errors="replace").splitlines():
            if re.match(r"(AssertionError|MemoryError|Fatal Python error|RuntimeError: (?!TaskGroup))", line):
                found.append(f"{log.name}: {line}")
    return found


async def quiet_answers(url: str, asked: list[Any]) -> dict[Any, list[int]]:
    """Send every prompt twice without faults, to check that the answers are stable."""
    expected = {}
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
        for question in asked:
            answers = [await http.post("/v1/completions", json=question.body(False)) for _ in range(2)]
            assert all(answer.status_code == 200 for answer in answers), answers[0].text
            ids = [answer.json()["choices"][0]["token_ids"] for answer in answers]
            assert ids[0] == ids[1], "the quiet run is not stable"
            expected[question] = ids[0]
    return expected


def chaos(options: argparse.Namespace, weights: dict[str, float]) -> list[str]:
    """Make one run; returns the violations."""
    run = ChaosRun(Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp")))
    run.sabotage = options.sabotage or ""
    (run.folder / "chaos").mkdir()
    sizes = f"max_num_batched_tokens = 96\ntensor_parallel = {options.tensor_parallel}"
    text = topology(prefills=2, decodes=2, lease_s=LEASE_S, kv_cache_gb=0.02, engine_extra=sizes)
    text = text.replace("[transfer]", f'[transfer]\nbackend = "{options.transport}"\nread_s = 1.0')
    text = text.replace("[supervisor]", "[supervisor]\nmax_restarts = 1000\nwithin_s = 10")
    left: list[str] = []
    started = time.monotonic()
    try:
        with running(run, text) as service:
            asked = questions(options.seed)
            expected = asyncio.run(quiet_answers(service.url, asked))
            ports = {p.name: p.ports["http"] for p in service.engines()}
            load, watch = Load(service.url, asked, expected, options.seed), Watch(ports, LEASE_S, service.internal)
            made = Chaos(service, load, watch, options.seed, weights)
            asyncio.run(made.run(options.faults, options.clients))
            left = load.violations + watch.violations
            if not left:
                service.wait(lambda: all(p.state == "ready" for p in service.status().processes), 60, "recovery")
                service.idle()
            left = left or crashes(run)
            _report(made, started)
    except AssertionError as failure:
        left.append(f"after the run: {failure}")
    if left and options.keep:
        print(f"kept: {run.folder}")
    else:
        shutil.rmtree(run.folder, ignore_errors=True)
    return left


def _report(made: Chaos, started: float) -> None:
    waits = sorted(made.watch.reclaimed)
    print(f"{sum(made.done.values())} faults in {time.monotonic() - started:.0f} s: {dict(made.done)}")
    print(f"answers: {dict(made.load.counts)}; {made.watch.polls} states audited")
    if waits:
        middle, worst = waits[len(waits) // 2], waits[-1]
        print(
            f"leases of {len(waits)} killed holders gone after {middle * 1e3:.0f} ms (median), "
            f"{worst * 1e3:.0f} ms (worst)"
        )


# With a disabled safeguard, the faults that it guards against are more frequent.
_PROVOKE = {
    "commit": {"revoke while read": 9.0, "kill engine": 0.2, "kill proxy": 0.0},
    "quarantine": {"late read": 20.0, "kill engine": 0.2, "kill proxy": 0.0},
    "witness": {"kill decode, proxy frozen": 5.0, "kill proxy": 0.0},
}
_USUAL = {
    "failpoint": 9.0,
    "late read": 3.0,
    "freeze": 2.0,
    "revoke": 3.0,
    "revoke while read": 2.0,
    "kill engine": 2.0,
    "kill proxy": 0.4,
    "lost lease": 0.7,
    "kill decode, proxy frozen": 0.7,
}


def main() -> int:
    """Returns 0 if every promise was kept (or, with a disabled safeguard, if this was detected)."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--transport", choices=["auto", "shm", "mooncake", "nixl"], default="auto")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes of each engine")
    parser.add_argument("--sabotage", choices=sorted(_PROVOKE))
    parser.add_argument("--keep", action="store_true", help="keep the run's files when something was violated")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    left = chaos(options, _PROVOKE[options.sabotage] if options.sabotage else _USUAL)
    for violation in left[:20]:
        print(f"VIOLATION: {violation}")
    print(f"{len(left)} violations, seed {options.seed}, requests have {DEADLINE_S:g} s")
    if options.sabotage:
        print(f"without {options.sabotage} the suite {'fails, as it must' if left else 'NOTICED NOTHING'}")
        return 0 if left else 1
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
