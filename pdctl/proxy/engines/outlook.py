"""Data about the engines for admission."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outlook:
    """The current state of the pool. `seats`: None if unknown. `ttft_s`: predicted for this request, 0 if unknown.

    `kv_room`: whether the request's KV fits on some engine.
    """

    seats: int | None
    ttft_s: float
    kv_room: bool = True
