"""What one mock engine is, holds and was told to do wrong."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.kv_events import Cache, Publisher

LETTERS = 26
PAGE = 16
# The bootstrap host for which SGLang transfers no KV.
FAKE_HOST = "2.2.2.2"


@dataclass
class Faults:
    """What goes wrong. Numbers count generated tokens; -1 is never.

    `die_before_pull`: decode ends when it gets a request; `die_after`, `retract_after`: in a stream; `status`: answer
    to the next generation call, 0 for none; `never_match`: decode does not look for its room.
    """

    die_before_pull: bool = False
    die_after: int = -1
    retract_after: int = -1
    status: int = 0
    never_match: bool = False


@dataclass
class Room:
    """A prefill's KV that waits for its decode engine."""

    ids: list[int] | None = None
    pulled: asyncio.Event = field(default_factory=asyncio.Event)


class Engine:
    """One mock engine."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.faults = Faults()
        self.rooms: dict[int, Room] = {}
        self.used: set[int] = set()
        # Requests that wait for their prompt's KV, or for their KV to be pulled; and streams.
        self.waiting: dict[str, asyncio.Task[object]] = {}
        self.streams = 0
        self.aborted: list[str] = []
        names = ("requests", "reused", "without_room", "timeouts", "prefilled", "pulled", "tokenized", "cached")
        self.counts = dict.fromkeys(names, 0)
        self.cache = Cache(PAGE)
        self.publisher: Publisher | None = None
        self.tokens = self.steps = 0
        self.registered = False
        self.token_s = float(os.environ.get("MOCK_TOKEN_S", "0.005"))
        self.prefill_s = float(os.environ.get("MOCK_PREFILL_S", "0.005"))
        self.bootstrap_s = _seconds("BOOTSTRAP_TIMEOUT", 300)
        self.waiting_s = _seconds("WAITING_TIMEOUT", 300)
        self.lost_s = _seconds("HEARTBEAT_INTERVAL", 5) * _seconds("HEARTBEAT_MAX_FAILURE", 2)

    def compute(self, ids: list[int]) -> None:
        """Compute a prompt, as far as its KV is not there."""
        self.counts["cached"] += self.cache.found(ids)
        self.publish(self.cache.compute(ids))

    def publish(self, events: list[dict[str, Any]]) -> None:
        """Tell of a change, if anybody listens."""
        if self.publisher is not None:
            self.publisher.publish(events)

    def told(self) -> dict[str, object]:
        """What happened so far, and what is held now."""
        running = len(self.waiting) + self.streams
        return {**self.counts, "rooms": len(self.rooms), "running": running, "aborted": self.aborted}


def _seconds(name: str, default: float) -> float:
    return float(os.environ.get(f"SGLANG_DISAGGREGATION_{name}", default))


def next_token(ids: list[int]) -> int:
    """The token after these: a letter."""
    value = 7
    for token in ids:
        value = (value * 131 + token) % 1_000_003
    return 97 + value % LETTERS


def answer_of(prompt: str, count: int) -> str:
    """The text that every engine must give for a prompt."""
    ids = list(prompt.encode())
    for _ in range(count):
        ids.append(next_token(ids))
    return "".join(map(chr, ids[len(prompt.encode()) :]))
