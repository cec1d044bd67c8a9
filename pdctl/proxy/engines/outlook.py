"""What admission is told about the engines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outlook:
    """The pool at this moment. `seats`: None when no engine says. `ttft_s`: predicted for this request, 0 if unknown.

    `kv_room`: whether its KV would fit somewhere.
    """

    seats: int | None
    ttft_s: float
    kv_room: bool = True
