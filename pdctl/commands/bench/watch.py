"""Sample a service's engines under load: running and waiting requests, KV in use, leases, tokens per second."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdctl.commands.common import control, running_services
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.control_api import MeasuredProcess

_EVERY_S = 0.5
_LEAK_S = 0.25
# Limit of samples: nearly three hours.
_MOST = 20_000
FIELDS = ("running", "waiting", "kv_used", "leases", "tokens_per_s")

# Per engine, a list for each of FIELDS (None: unknown); `at`: times of the monotonic clock in seconds.
Samples = dict[str, object]


@dataclass
class Engines:
    """Samples of the engines. Only this user's own services are sampled, not a bare engine elsewhere."""

    at: list[float] = field(default_factory=list)
    by_engine: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)

    @property
    def samples(self) -> Samples:
        """The samples, for a result file."""
        return {"at": self.at, "engines": self.by_engine} if self.at else {}

    @contextmanager
    def watched(self, url: str) -> Iterator[None]:
        """Sample the service at this address from a thread for the duration of the context."""
        name = _service_at(url)
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(name, over), daemon=True)
        if name:
            watch.start()
        try:
            yield
        finally:
            over.set()
            if name:
                watch.join(timeout=15)

    def _watch(self, service: str, over: threading.Event) -> None:
        while len(self.at) < _MOST:
            # The supervisor may be gone or restarting: the load goes on without samples.
            with contextlib.suppress(PdctlError):
                self._sample(control(service).status().processes)
            if over.wait(_EVERY_S):
                return

    def _sample(self, processes: Iterable[MeasuredProcess]) -> None:
        count = len(self.at)
        self.at.append(time.monotonic())
        for process in processes:
            if not process.is_engine:
                continue
            lists = self.by_engine.setdefault(process.name, {name: [None] * count for name in FIELDS})
            values = (process.running, process.waiting, process.kv_used, process.leases, process.tokens_per_s)
            for name, value in zip(FIELDS, values, strict=True):
                lists[name].append(None if value is None else float(value))
        for lists in self.by_engine.values():
            for samples in lists.values():
                samples.extend([None] * (len(self.at) - len(samples)))


def engines_at(url: str) -> int:
    """Number of engines behind an address; 0 if it is not one of this user's services."""
    name = _service_at(url)
    if not name:
        return 0
    return sum(process.is_engine for process in control(name).status(measurements=False).processes)


def certificate_at(url: str) -> str:
    """The TLS certificate of the running service at this address; "" if there is none."""
    name = _service_at(url)
    return control(name).status(measurements=False).tls_cert if name else ""


def _service_at(url: str) -> str:
    """The running service with its proxy at this address; "" if there is none."""
    for name in running_services():
        try:
            status = control(name).status(measurements=False)
            if url.rstrip("/").removesuffix("/v1") in (status.proxy_url, *status.proxy_urls):
                return name
        except PdctlError:
            continue
    return ""


@dataclass
class Leaks:
    """Leaked KV, as `pdctl kv --leaks` reports it: leases with a holder that is gone or does not answer."""

    block_seconds: float = 0.0
    most_blocks: int = 0
    looks: int = 0

    def watch(self, service: str, wait: Callable[[float], bool]) -> None:
        """Sample until `wait` returns true. Blocks leaked at one sample count as leaked until the next."""
        before, blocks = time.monotonic(), 0
        while not wait(_LEAK_S):
            with contextlib.suppress(PdctlError):
                found = control(service).leases()
                now = time.monotonic()
                self.block_seconds += blocks * (now - before)
                before, blocks = now, sum(lease.blocks for lease in found.leases if lease.leak)
                self.most_blocks = max(self.most_blocks, blocks)
                self.looks += 1
