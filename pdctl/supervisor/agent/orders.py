"""Follows what this node is to run, and has it run.

An order is state, not a call: the newest one counts, and one that was obeyed is obeyed again after a restart. It names
engines of a topology, and never carries a command line: this node makes its own plan of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Never, Protocol

import msgspec

from pdctl.errors import PdctlError
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.registry import Change, Registry
from pdctl.registry.mirror import follow
from pdctl.supervisor.agent.turns import Turns
from pdctl.supervisor.cluster.entries import Keys, Order
from pdctl.supervisor.service.change.apply import Progress

_TERM = "term"
# An apply that is in the way is waited for: it is looked at this often.
_LOOK_S = 0.2
# An order that could not be carried out is tried again after so many seconds, doubled each time up to the longest.
_AGAIN_S, _LONGEST_AGAIN_S = 5.0, 60.0


class Obeying(Protocol):
    """What obeying needs of a service."""

    @property
    def plan(self) -> Plan: ...
    @property
    def applied(self) -> Progress | None: ...
    async def until_applied(self) -> None: ...
    def changes(self, wanted: Plan) -> Changes: ...
    def apply(self, wanted: Plan) -> str: ...


class Orders:
    """`plan_of` makes the plan of an order, with what runs now; it raises PdctlError. `told` is called with why an
    order is not obeyed, None once it is. `turns`: for restarts. `state_dir` keeps the highest term."""

    def __init__(
        self,
        registry: Registry,
        keys: Keys,
        node: str,
        plan_of: Callable[[Order, Plan], Awaitable[Plan]],
        told: Callable[[str | None], None],
        heard: Callable[[str | None], None],
        turns: Turns,
        state_dir: Path,
        again_s: float = _AGAIN_S,
    ) -> None:
        self.newest: Order | None = None
        self._registry = registry
        self._key = keys.order(node)
        self._plan_of = plan_of
        self._told = told
        self._heard = heard
        self._turns = turns
        self._again_s = again_s
        self._file = state_dir / _TERM
        self._term = _read_term(self._file)
        self._news = asyncio.Event()

    async def run_forever(self, service: Obeying) -> Never:
        """Follow and obey until cancelled. Raises Refused."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follow(self._registry, self._key, self._take, self._heard))
            tasks.create_task(self._obey_forever(service))
        raise AssertionError("both tasks run for ever")

    def _take(self, changes: tuple[Change, ...]) -> None:
        """An order that is deleted changes nothing: to stop everything is an order of its own."""
        for change in changes:
            if change.key != self._key or change.entry is None:
                continue
            try:
                order = msgspec.json.decode(change.entry.value, type=Order)
            except (msgspec.DecodeError, UnicodeDecodeError) as failure:
                self._told(f"the order in {self._key} is not understood: {failure}")
                continue
            if order.term < self._term:
                self._told(
                    f"the order is of term {order.term}, but term {self._term} was seen: a coordinator before gave it. "
                    f"If etcd was set up anew, remove {self._file} and start the agent again"
                )
                continue
            self._keep_term(order.term)
            self.newest = order
            self._news.set()

    async def _obey_forever(self, service: Obeying) -> Never:
        failures = 0
        while True:
            await self._news.wait()
            self._news.clear()
            order = self.newest
            assert order is not None
            try:
                await self._obey(service, order)
                self._told(None)
                failures = 0
            except PdctlError as failure:
                self._told(failure.message)
                await self._until_again(failures)
                failures += 1

    async def _until_again(self, failures: int) -> None:
        """What failed may work later: a GPU that was in use, a full disk, a model that could not be downloaded."""
        pause_s = min(_LONGEST_AGAIN_S, self._again_s * 2.0 ** min(failures, 10))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s * (0.5 + random.random() / 2)):  # noqa: S311 - jitter, no secret
                await self._news.wait()
        self._news.set()

    async def _obey(self, service: Obeying, order: Order) -> None:
        """Returns when the order is obeyed, or when there is a newer one. Raises PdctlError."""
        await service.until_applied()
        plan = await self._plan_of(order, service.plan)
        changes = service.changes(plan)
        if changes.is_empty:
            return
        if changes.restarted:
            await self._turns.act(lambda: self._apply(service, plan), self._news.is_set)
        else:
            await self._apply(service, plan)

    async def _apply(self, service: Obeying, plan: Plan) -> None:
        """Returns when it is applied, or there is a newer order. Raises PdctlError."""
        while reason := service.apply(plan):
            if self._news.is_set():
                return
            self._told(f"waiting: {reason}")
            await asyncio.sleep(_LOOK_S)
        await service.until_applied()
        if (progress := service.applied) is not None and progress.state == "failed":
            raise PdctlError(progress.error)

    def _keep_term(self, term: int) -> None:
        if term == self._term:
            return
        self._term = term
        # Without the file, only an older coordinator that still lives could be obeyed after a restart.
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            scratch = self._file.with_suffix(".tmp")
            scratch.write_text(str(term))
            scratch.replace(self._file)


def _read_term(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0
