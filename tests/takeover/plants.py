"""Faults on purpose, to see that the clients find them: code that every process of a service runs at its start."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SOCKET_FIRST = """
from pdctl.proxy.takeover import cover
import asyncio

def part(self, data, notes=b""):
    self.send(data)
    slot = self.slot
    # The note comes a moment later.
    later = lambda: slot is not None and slot.cookie and (slot.put(data, notes) or self.lose())
    asyncio.get_running_loop().call_later(0.05, later)

cover.Cover.part = part
"""
_OFF_BY_ONE = """
from pdctl.proxy.takeover import adoption, kernel
from dataclasses import replace
adoption.counts_of = lambda connection: (lambda c: replace(c, taken=c.taken - 1))(kernel.counts_of(connection))
"""
_NO_KEEPER = """
from pdctl.supervisor.process import keeper
keeper.Keeper._keep = lambda self, cookie, descriptor: False
"""
# What no client notices: each proxy dies at the one moment at which nobody else was given its newest connection.
_DIES_AT_ACCEPT = """
from pdctl.proxy.takeover import covers
import itertools, os, signal
new, count = covers.Covers.new, itertools.count(1)

def dying(self, connection):
    if next(count) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return new(self, connection)

covers.Covers.new = dying
"""
# Fault: what does it, and the process that it is for.
PLANTS = {
    "": ("", ""),
    "socket-first": (_SOCKET_FIRST, "pdctl.proxy"),
    "off-by-one": (_OFF_BY_ONE, "pdctl.proxy"),
    "no-keeper": (_NO_KEEPER, "pdctl.supervisor"),
    "dies-at-accept": (_DIES_AT_ACCEPT, "pdctl.proxy"),
}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """While inside, services that are started have the fault. Python runs sitecustomize in every process."""
    code, module = PLANTS[fault]
    if not code:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="pd-plant-") as folder:
        guard = f"import sys\nif any({module!r} in word for word in sys.orig_argv):\n"
        body = "".join(f"    {line}\n" for line in code.splitlines())
        (Path(folder) / "sitecustomize.py").write_text(guard + body)
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = f"{folder}:{before}"
        try:
            yield
        finally:
            os.environ["PYTHONPATH"] = before
