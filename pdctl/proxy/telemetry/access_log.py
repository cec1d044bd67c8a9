"""One JSON line per request, written in batches."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

import msgspec

from pdctl.errors import PdctlError
from pdctl.net.openai.api import Counts
from pdctl.proxy.telemetry.timing import Timing

_log = logging.getLogger(__name__)

_FLUSH_S = 0.5
# Limit of lines kept while the disk does not accept them.
_MAX_LINES = 65536

_encode = msgspec.json.Encoder().encode


class AccessLog:
    """Disabled without a path. Lines that cannot be written are dropped and counted; nothing waits for them."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines: list[bytes] = []
        self._dropped = 0
        self._file = _opened(path) if path else None

    def __bool__(self) -> bool:
        return self._file is not None

    def add(
        self, request_id: str, key: str, path: str, status: int, counts: Counts, timing: Timing, failures: int
    ) -> None:
        """Log a finished request. `counts`: of tokens."""
        if len(self._lines) >= _MAX_LINES:
            self._dropped += 1
            return
        line: dict[str, object] = {
            "time": round(time.time(), 3), "request_id": request_id, "key": key, "path": path, "status": status,
            "prompt_tokens": counts.prompt, "cached_tokens": counts.cached, "output_tokens": counts.completion,
            "failovers": failures,
            "prefill_engine": timing.engines[0], "decode_engine": timing.engines[1],
            "seconds": round(time.monotonic() - timing.received_at, 6),
            **{f"{name}_s": round(seconds, 6) for name, seconds in timing.parts().items()},
        }  # fmt: skip
        self._lines.append(_encode(line) + b"\n")

    def move_to(self, path: str) -> None:
        """Write to another file, or to none. Raises PdctlError and then changes nothing."""
        if path == self._path:
            return
        opened = _opened(path) if path else None
        self.flush()
        if self._file is not None:
            os.close(self._file)
        self._path, self._file = path, opened

    async def run_forever(self) -> None:
        """Write the collected lines at intervals."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            self.flush()

    def flush(self) -> None:
        """Write now. If the file was renamed by a rotation, a new one is opened."""
        if self._file is None or not self._lines:
            return
        lines, self._lines = self._lines, []
        try:
            if not Path(self._path).exists():
                os.close(self._file)
                self._file = _opened(self._path)
            os.write(self._file, b"".join(lines))
        except (OSError, PdctlError) as failure:
            self._dropped += len(lines)
            _log.warning("access log: %s; %d lines lost so far", failure, self._dropped)


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    except OSError as failure:
        hint = "proxy.access_log must be a writable file"
        raise PdctlError(f"access log {path} cannot be opened: {failure.strerror}", hint) from failure
