"""The order in which prompts are computed. Each policy is a pure function of a prompt that waits.

The key of a waiting prompt does not change with time, so a heap keeps the order. Prompts that a policy would leave
waiting get a part of the work of their own (see `share`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that waits, or is computed in part. Seconds; `arrived_s` and `deadline_s` by one monotonic clock.
    `work_s`: predicted seconds until its first token, if nothing else were computed; `whole_s`: the same at its
    beginning."""

    arrived_s: float
    work_s: float
    whole_s: float
    deadline_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Policy:
    """`key`: seconds; the smallest goes first. `late_from`: from this moment on the prompt goes behind all that are not
    late."""

    key: Callable[[Prompt], float]
    late_from: Callable[[Prompt], float] = lambda _: math.inf


def _first_come(prompt: Prompt) -> float:
    return prompt.arrived_s


def _longest(prompt: Prompt) -> float:
    # By the work that is left, all long prompts would be passed by turns and end at the same late time.
    return -prompt.whole_s


def _shortest(prompt: Prompt) -> float:
    return prompt.work_s


def _deadline(prompt: Prompt) -> float:
    return prompt.deadline_s


def _latest_start(prompt: Prompt) -> float:
    """Plain EDF collapses under overload: it computes what is already too late and makes the next ones late as well
    (the domino effect of Locke, 1986). What cannot be in time any more therefore goes last."""
    return prompt.deadline_s - prompt.work_s


POLICIES = {
    "fcfs": Policy(_first_come),
    "ljf": Policy(_longest),
    "sjf": Policy(_shortest),
    "edf": Policy(_deadline, _latest_start),
}
