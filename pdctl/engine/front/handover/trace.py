"""The hand-over protocol's events as JSON lines, for the trace checker in the tests."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TextIO

TRACE_ENV = "PDCTL_TRACE_DIR"


class Trace:
    """Writes events if PDCTL_TRACE_DIR is set."""

    def __init__(self, engine: str, epoch: str) -> None:
        self._file: TextIO | None = None
        self._who = {"engine": engine, "epoch": epoch}
        if folder := os.environ.get(TRACE_ENV):
            Path(folder).mkdir(parents=True, exist_ok=True)
            # Line buffered, so that a kill -9 loses no written line.
            self._file = (Path(folder) / f"{engine}-{epoch}.jsonl").open("a", buffering=1)

    def write(self, event: str, lease_id: str, **details: object) -> None:
        """One event, stamped with the boot clock."""
        if self._file is None:
            return
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        line = {"at": now, **self._who, "event": event, "lease": lease_id, **details}
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
