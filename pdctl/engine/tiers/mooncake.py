"""A Mooncake Store that engines share, through Mooncake's own client.

What was seen of it (0.3.13): a dead master lets calls wait for over 4 s, a setup without one for 90 s; a store that is
full refuses; whatever is not there is empty; contents are not checked.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pdctl.engine.lifeline import vital
from pdctl.engine.tiers import Rows, TierCounts, TierFailed, TierRefused
from pdctl.engine.tiers.calls import LONGEST_PAUSE_S, Breaker, Caller
from pdctl.engine.tiers.sealed import Sealed

if TYPE_CHECKING:
    from mooncake.store import MooncakeDistributedStore

_log = logging.getLogger(__name__)

# Deadlines: of a question, and of a copy in addition to its bytes at the slowest rate, bytes per second.
_ASK_S, _COPY_S, _SLOWEST = 0.25, 0.5, 50e6
# A put may take as long as Mooncake tries by itself.
_PUT_S = 6.0
_NO_ROOM = -200
CONFIG_ENV, HOST_ENV = "MOONCAKE_CONFIG_PATH", "MOONCAKE_REQUESTER_LOCAL_HOSTNAME"


class Config(msgspec.Struct, frozen=True):
    """The file that the supervisor writes for each engine, in Mooncake's words."""

    metadata_server: str
    master_server_address: str
    protocol: str
    device_name: str
    global_segment_size: int
    local_buffer_size: int


class MooncakeTier:
    """See Tier. `prefix`: of all keys."""

    name = "store"
    num_blocks = 0

    def __init__(self, prefix: str, sealed: Sealed, block_bytes: int, client: MooncakeDistributedStore) -> None:
        self.counts = TierCounts()
        self._prefix = prefix
        self._sealed = sealed
        self._block_bytes = block_bytes
        self._client = client
        self._reads = Caller("the store", Breaker())
        self._writes = Caller("the store", Breaker())
        self._is_set_up = threading.Event()

    @property
    def is_there(self) -> bool:
        """See Tier.is_there."""
        return self._is_set_up.is_set() and self._reads.is_free

    def set_up(self, config: Config, host: str) -> None:
        """Connect, in the background and until it works: the store may be starting."""
        work = partial(self._set_up, config, host)
        threading.Thread(target=vital(work), name="store-setup", daemon=True).start()

    def leading(self, names: Sequence[bytes]) -> int:
        """See Tier.leading."""
        found = self._reads.call(lambda: self._exist(names), _ASK_S)
        return next((number for number, is_there in enumerate(found) if not is_there), len(found))

    def missing(self, names: Sequence[bytes]) -> list[bool]:
        """See Tier.missing."""
        return [not is_there for is_there in self._writes.call(lambda: self._exist(names), _PUT_S)]

    def get(self, names: Sequence[bytes]) -> Rows:
        """See Tier.get."""
        timeout_s = _COPY_S + len(names) * self._block_bytes / _SLOWEST
        rows: list[Rows] = self._reads.call(lambda: self._opened(names), timeout_s)
        self.counts.loaded += len(rows)
        return np.stack(rows) if rows else np.empty((0, self._block_bytes), np.uint8)

    def put(self, names: Sequence[bytes], rows: Rows, tenants: Sequence[str]) -> None:
        """See Tier.put. What is given up for it is the store's decision."""
        try:
            self._writes.call(lambda: self._put(names, rows), _PUT_S + rows.nbytes / _SLOWEST)
        except TierFailed:
            self.counts.refused += len(names)
            raise
        self.counts.stored += len(names)

    def changes(self) -> tuple[list[bytes], list[bytes]]:
        """See Tier.changes: others have these blocks, too."""
        return [], []

    def close(self) -> None:
        """See Tier.close. The client is not closed: that would wait for a dead store, and the process ends."""
        self._reads.close()
        self._writes.close()

    # -- in the callers' threads -----------------------------------------------------------------------------

    def _set_up(self, config: Config, host: str) -> None:
        while (code := _setup(self._client, config, host)) != 0:
            _log.warning("the store cannot be used yet (Mooncake's code %d)", code)
            # For as long as the engine runs: the store may come back at any time. Its engines do not come at once.
            time.sleep(LONGEST_PAUSE_S * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, no secret
        _log.info("the store at %s is used", config.master_server_address)
        self._is_set_up.set()

    def _key(self, name: bytes) -> str:
        return self._prefix + name.hex()

    def _exist(self, names: Sequence[bytes]) -> list[bool]:
        if not self._is_set_up.is_set():
            raise TierFailed("the store is not connected yet")
        with _translated():
            found = self._client.batch_is_exist([self._key(name) for name in names])
        if len(found) != len(names) or any(code < 0 for code in found):
            raise TierFailed(f"the store does not say what it has (Mooncake's code {min(found, default=0)})")
        return [code == 1 for code in found]

    def _opened(self, names: Sequence[bytes]) -> list[Rows]:
        rows: list[Rows] = []
        with _translated():
            values = self._client.get_batch([self._key(name) for name in names])
        for name, value in zip(names, values, strict=False):
            if not value:
                break
            row = self._sealed.opened(name, value)
            if row is None:
                self.counts.wrong += 1
                _log.warning("a block of the store is not what it should be; it is removed, and computed")
                # By force: to read it has given it a lease. Who reads it meanwhile finds out as well.
                with _translated():
                    self._client.remove(self._key(name), True)
                break
            rows.append(row)
        return rows

    def _put(self, names: Sequence[bytes], rows: Rows) -> None:
        keys = [self._key(name) for name in names]
        values = [self._sealed.seal(name, row) for name, row in zip(names, rows, strict=True)]
        with _translated():
            code = self._client.put_batch(keys, values)
        if code == _NO_ROOM:
            raise TierFailed("the store is full")
        if code != 0:
            raise TierFailed(f"the store does not take blocks (Mooncake's code {code})")


def open_store(prefix: str, secret: str, block_bytes: int) -> MooncakeTier:
    """See StoreKind.open_store."""
    if not (path := os.environ.get(CONFIG_ENV, "")):
        raise TierRefused(f"{CONFIG_ENV} does not name the store's file")
    try:
        config = msgspec.json.decode(Path(path).read_bytes(), type=Config)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise TierRefused(f"the store's file {path} cannot be used: {failure}") from failure
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as failure:
        raise TierRefused(
            f"mooncake.store cannot be imported: {failure}; install mooncake-transfer-engine"
        ) from failure
    tier = MooncakeTier(prefix, Sealed(secret, block_bytes), block_bytes, MooncakeDistributedStore())
    tier.set_up(config, os.environ.get(HOST_ENV, "127.0.0.1"))
    return tier


@contextmanager
def _translated() -> Iterator[None]:
    """Exceptions of Mooncake's client, which are those of C++, become TierFailed."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as failure:
        raise TierFailed(f"the store's client failed: {failure}") from failure


def _setup(client: MooncakeDistributedStore, config: Config, host: str) -> int:
    """Mooncake's code; 0: it is connected."""
    try:
        with _translated():
            code: int = client.setup(
                host,
                config.metadata_server,
                config.global_segment_size,
                config.local_buffer_size,
                config.protocol,
                config.device_name,
                config.master_server_address,
            )
    except TierFailed as failure:
        _log.warning("%s", failure)
        return -1
    return code
