"""`python -m pdctl.supervisor`: run the plan given on stdin, detached from any terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from datetime import UTC, datetime

import msgspec

from pdctl.errors import PdctlError
from pdctl.plan import Plan
from pdctl.supervisor.service import Service


def main() -> int:
    """Exit code 0 after a clean stop, 1 when the service could not start."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    service = Service(plan, _say)
    code = 0
    try:
        asyncio.run(service.run())
    except* PdctlError as failures:
        code = _fail(str(failures.exceptions[0]))
    if service.failure is not None:
        code = _fail(f"the service did not start: {service.failure}")
    return code


def _say(name: str, message: str) -> None:
    _write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {name}: {message}\n")


def _fail(message: str) -> int:
    _write(f"error: {message}\n")
    return 1


def _write(line: str) -> None:
    """Straight to the descriptor. A full disk loses lines of the log; it must not end the service."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


sys.exit(main())
