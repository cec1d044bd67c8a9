"""Clients during fault injection: each answer must equal that of the run without faults, or be a clean error."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

# A request may survive several restarts; after this time it counts as hanging.
DEADLINE_S = 90.0

_WORDS = "the quick brown fox jumps over a lazy dog while seven old wizards brew potent ale near my box".split()  # noqa: SIM905


@dataclass(frozen=True)
class Question:
    prompt: str
    max_tokens: int
    seed: int | None

    def body(self, stream: bool) -> dict[str, Any]:
        sampling = {"temperature": 0} if self.seed is None else {"temperature": 0.8, "seed": self.seed}
        return {"prompt": self.prompt, "max_tokens": self.max_tokens, "ignore_eos": True, "stream": stream,
                "return_token_ids": True, **sampling}  # fmt: skip


def questions(seed: int, count: int = 24) -> list[Question]:
    """Prompts of a few to several hundred tokens; some are sampled with a seed."""
    chance = random.Random(seed)
    found = []
    for index in range(count):
        words = chance.choices(_WORDS, k=chance.choice([3, 20, 50, 100, 150]))
        found.append(Question(f"{index} " + " ".join(words), chance.randint(4, 40), index if index % 3 == 0 else None))
    return found


@dataclass
class Load:
    """`clients` loops over the prompts until stopped. `expected`: the answers of the run without faults."""

    url: str
    asked: list[Question]
    expected: dict[Question, list[int]]
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    stopping: bool = False

    async def client(self, number: int) -> None:
        chance = random.Random(self.seed * 1000 + number)
        limits = httpx.Limits(max_keepalive_connections=1)
        async with httpx.AsyncClient(base_url=self.url, timeout=None, trust_env=False, limits=limits) as http:
            while not self.stopping:
                question = chance.choice(self.asked)
                leaves = chance.random() < 0.1
                patience = chance.uniform(0.01, 0.5) if leaves else DEADLINE_S
                try:
                    async with asyncio.timeout(patience):
                        outcome = await self._ask(http, question, chance.random() < 0.7)
                except TimeoutError:
                    outcome = "left" if leaves else "hangs"
                    if not leaves:
                        self.violations.append(f"a request hangs for more than {DEADLINE_S:g} s")
                self.counts[outcome] += 1

    async def _ask(self, http: httpx.AsyncClient, question: Question, stream: bool) -> str:
        try:
            if stream:
                return await self._stream(http, question)
            answer = await http.post("/v1/completions", json=question.body(False))
        except httpx.TransportError as failure:
            return "cut by the proxy's death" if self.proxy_may_die else self._wrong(f"cut: {failure!r}")
        if answer.status_code != 200:
            return self._refusal(answer.status_code, answer.text)
        return self._compare(question, answer.json()["choices"][0]["token_ids"])

    # A dead proxy cuts its streams: it is the only process with a death that clients notice.
    proxy_may_die = False

    async def _stream(self, http: httpx.AsyncClient, question: Question) -> str:
        ids: list[int] = []
        done = False
        async with http.stream("POST", "/v1/completions", json=question.body(True)) as answer:
            if answer.status_code != 200:
                return self._refusal(answer.status_code, (await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return self._refusal(event["error"].get("code") or 500, line)
                    ids += [token for choice in event["choices"] for token in choice["token_ids"]]
        if not done:
            return self._wrong(f"a stream ended without [DONE] after {len(ids)} tokens")
        return self._compare(question, ids)

    def _compare(self, question: Question, ids: list[int]) -> str:
        if ids == self.expected[question]:
            return "exact"
        same = next((i for i, (a, b) in enumerate(zip(ids, self.expected[question], strict=False)) if a != b), len(ids))
        return self._wrong(f"wrong tokens from position {same} of {question.max_tokens}: {question.prompt[:20]!r}")

    def _refusal(self, status: object, text: str) -> str:
        if "message" not in text:
            return self._wrong(f"an error that says nothing: {status} {text[:100]}")
        return f"clean error {status}"

    def _wrong(self, what: str) -> str:
        self.violations.append(what)
        return "wrong"
