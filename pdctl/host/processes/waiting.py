"""Waits for descriptors, whatever their numbers are: select() fails for those above 1023."""

from __future__ import annotations

import select
from collections.abc import Sequence


def readable(descriptors: Sequence[int], within_s: float | None) -> list[int]:
    """Those that can be read, as soon as there is one; none after `within_s`. A pidfd can be read when its process has
    ended."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(None if within_s is None else within_s * 1000)]
