"""Clients of a service over hosts: each token that they get must be the one that one machine gives."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pdctl.net.http_client import ConnectionPool, Unreachable
from tests.hosts.lab import Lab

# A stream that gives nothing for so long counts as silent. A proxy retries for less.
SILENT_S = 30.0
_THINK_S = 0.1
_WORDS = "the quick brown fox jumps over a lazy dog while seven old wizards brew potent ale near my box".split()  # noqa: SIM905


@dataclass(frozen=True)
class Question:
    """`seed` None: greedy."""

    prompt: str
    max_tokens: int
    seed: int | None

    def body(self) -> dict[str, Any]:
        """The request, as a stream."""
        sampling = {"temperature": 0} if self.seed is None else {"temperature": 0.8, "seed": self.seed}
        return {"prompt": self.prompt, "max_tokens": self.max_tokens, "ignore_eos": True, "stream": True,
                "return_token_ids": True, **sampling}  # fmt: skip


def questions(seed: int, count: int = 24) -> list[Question]:
    """Prompts of a few to some hundred tokens; every other one is sampled with a seed."""
    chance = random.Random(seed)
    found = []
    for index in range(count):
        words = chance.choices(_WORDS, k=chance.choice([3, 20, 50, 100]))
        found.append(Question(f"{index} " + " ".join(words), chance.randint(8, 64), index if index % 2 else None))
    return found


@dataclass(frozen=True)
class Outcome:
    """How one request ended. `kind`: exact, refused (a clear error), elsewhere (no connection, nothing was sent), cut
    (the connection ended), silent, wrong. `gap_s`: the longest wait for a token. Times are monotonic."""

    node: str
    kind: str
    began: float
    ended: float
    tokens: int
    gap_s: float
    detail: str = ""


@dataclass
class Streams:
    """`clients` that ask one question after another, each time of one of the proxies in `addresses`, until stopped."""

    lab: Lab
    addresses: dict[str, tuple[str, int]]
    asked: list[Question]
    expected: dict[Question, list[int]]
    clients: int = 16
    seed: int = 1
    outcomes: list[Outcome] = field(default_factory=list)
    _stopping: bool = False
    _running: Future[None] | None = None

    def __enter__(self) -> Streams:
        self._stopping = False
        self._running = self.lab.begin(asyncio.run, self._run())
        return self

    def __exit__(self, *_failure: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let running requests end."""
        self._stopping = True
        if self._running is not None:
            self._running.result()
            self._running = None

    def counts(self) -> Counter[str]:
        """How many requests ended in each way."""
        return Counter(outcome.kind for outcome in self.outcomes)

    def violations(self, gone: Iterable[str] = (), may_refuse: bool = False) -> list[str]:
        """What breaks a promise. `gone`: nodes with proxies that were killed, or cannot be heard; `may_refuse`: no
        engine of some role was in reach."""
        lost = set(gone)
        found = []
        for outcome in self.outcomes:
            if outcome.kind in ("exact", "elsewhere"):
                continue
            if outcome.kind in ("cut", "silent") and outcome.node in lost:
                continue
            if outcome.kind == "refused" and (may_refuse and outcome.detail.startswith("503")):
                continue
            lasted = outcome.ended - outcome.began
            found.append(f"{outcome.kind} at {outcome.node} after {lasted:.1f} s: {outcome.detail}")
        return found

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.clients):
                tasks.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        chance = random.Random(self.seed * 1000 + number)
        pools = {node: ConnectionPool(host, port) for node, (host, port) in self.addresses.items()}
        try:
            while not self._stopping:
                node = chance.choice(list(pools))
                outcome = await self._ask(node, pools[node], chance.choice(self.asked))
                self.outcomes.append(outcome)
                await asyncio.sleep(_THINK_S)
        finally:
            for pool in pools.values():
                pool.close()

    async def _ask(self, node: str, pool: ConnectionPool, question: Question) -> Outcome:
        answer = Answer(self.expected[question])
        began = time.monotonic()
        kind, detail = "", ""
        try:
            kind, detail = await self._read(pool, question, answer)
        except Unreachable as failure:
            kind, detail = ("cut" if failure.begun else "elsewhere"), str(failure)
        except TimeoutError:
            kind, detail = "silent", f"nothing for {SILENT_S:g} s after {len(answer.ids)} tokens"
        return Outcome(node, kind, began, time.monotonic(), len(answer.ids), answer.gap_s, detail)

    async def _read(self, pool: ConnectionPool, question: Question, answer: Answer) -> tuple[str, str]:
        headers = b"content-type: application/json\r\n"
        exchange = pool.exchange("POST", "/v1/completions", headers, json.dumps(question.body()).encode())
        try:
            async with asyncio.timeout(SILENT_S):
                status = await exchange.head()
            if status != 200:
                async with asyncio.timeout(SILENT_S):
                    return _refusal(status, (await exchange.rest()).decode())
            while True:
                async with asyncio.timeout(SILENT_S):
                    data = await exchange.read()
                if data is None:
                    return "wrong", f"the stream ended without [DONE] after {len(answer.ids)} tokens"
                if verdict := answer.take(data):
                    return verdict
        finally:
            exchange.close()


class Answer:
    """One stream as it arrives."""

    def __init__(self, expected: list[int]) -> None:
        self.ids: list[int] = []
        self.gap_s = 0.0
        self._expected = expected
        self._rest = b""
        self._last = time.monotonic()

    def take(self, data: bytes) -> tuple[str, str] | None:
        """The verdict when the stream is over."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return self._compared(whole=True)
            event = json.loads(line[6:])
            if "error" in event:
                return _refusal(event["error"].get("code") or 500, line.decode())
            self._token(event)
            if self.ids != self._expected[: len(self.ids)]:
                return self._compared(whole=False)
        return None

    def _token(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        self.gap_s = max(self.gap_s, now - self._last)
        self._last = now
        self.ids += [token for choice in event["choices"] for token in choice["token_ids"]]

    def _compared(self, whole: bool) -> tuple[str, str]:
        if whole and self.ids == self._expected:
            return "exact", ""
        pairs = zip(self.ids, self._expected, strict=False)
        at = next((index for index, (one, other) in enumerate(pairs) if one != other), len(self.ids))
        return "wrong", f"the answer differs at token {at} of {len(self._expected)}"


def _refusal(status: object, text: str) -> tuple[str, str]:
    if "message" not in text:
        return "wrong", f"an error that says nothing: {status} {text[:100]}"
    return "refused", f"{status} {text[:300]}"
