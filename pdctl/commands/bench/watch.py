"""What a service's engines do while load is put on it: running and waiting requests, KV in use, leases."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pdctl.commands.common import STATE, call, running_services
from pdctl.errors import PdctlError

_EVERY_S = 0.5
_LEAK_S = 0.25
# Hours of samples: enough for any plot.
_MOST = 20_000
FIELDS = ("running", "waiting", "kv_used", "leases", "tokens_per_s")

# By engine, a list for each of FIELDS, None where it was not known; `at`: seconds of the monotonic clock.
Samples = dict[str, object]


@dataclass
class Engines:
    """Nothing is sampled of a service that is not one of this user's own, such as a bare engine elsewhere."""

    at: list[float] = field(default_factory=list)
    seen: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)

    @property
    def samples(self) -> Samples:
        """For a result file."""
        return {"at": self.at, "engines": self.seen} if self.at else {}

    @contextmanager
    def watched(self, url: str) -> Iterator[None]:
        """Sample the service that answers at this address, from a thread, as long as this lasts."""
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
            # A supervisor that is gone or restarting: the load goes on without it.
            with contextlib.suppress(PdctlError, KeyError):
                self._sample(call(service, "GET", "/v1/status")["processes"])
            if over.wait(_EVERY_S):
                return

    def _sample(self, processes: list[dict[str, object]]) -> None:
        count = len(self.at)
        self.at.append(time.monotonic())
        for process in processes:
            if process["kind"] == "proxy":
                continue
            lists = self.seen.setdefault(str(process["name"]), {name: [None] * count for name in FIELDS})
            for name in FIELDS:
                value = process.get(name)
                lists[name].append(float(value) if isinstance(value, int | float) else None)
        for lists in self.seen.values():
            for values in lists.values():
                values.extend([None] * (len(self.at) - len(values)))


def engines_at(url: str) -> int:
    """How many engines stand behind an address; 0 where it is none of this user's services."""
    name = _service_at(url)
    if not name:
        return 0
    return sum(process["kind"] != "proxy" for process in call(name, "GET", STATE)["processes"])


def certificate_at(url: str) -> str:
    """The certificate that the running service of this address serves with; "" for none."""
    name = _service_at(url)
    return str(call(name, "GET", STATE)["tls_cert"]) if name else ""


def _service_at(url: str) -> str:
    """The running service whose proxy has this address; "" for none."""
    for name in running_services():
        try:
            if str(call(name, "GET", STATE)["proxy_url"]) == url.rstrip("/").removesuffix("/v1"):
                return name
        except (PdctlError, KeyError):
            continue
    return ""


@dataclass
class Leaks:
    """KV that is leased to a holder that is gone or silent, as `pdctl kv --leaks` tells: how much, for how long."""

    block_seconds: float = 0.0
    most_blocks: int = 0
    looks: int = 0

    def watch(self, service: str, wait: Callable[[float], bool]) -> None:
        """Look again and again, until `wait` says that it is over; what was leaked at a look counts until the next."""
        before, blocks = time.monotonic(), 0
        while not wait(_LEAK_S):
            with contextlib.suppress(PdctlError, KeyError):
                found = call(service, "GET", "/v1/kv")
                now = time.monotonic()
                self.block_seconds += blocks * (now - before)
                before, blocks = now, sum(int(lease["blocks"]) for lease in found["leases"] if lease["leak"])
                self.most_blocks = max(self.most_blocks, blocks)
                self.looks += 1
