"""`python -m pdctl.supervisor`: run the plan given on stdin, detached from any terminal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import traceback
from datetime import UTC, datetime

import msgspec

from pdctl.errors import PdctlError, PortsTaken, first_of
from pdctl.plan import Plan
from pdctl.supervisor.process.succession import received
from pdctl.supervisor.service.service import Service
from pdctl.wire import EXIT_PORTS_TAKEN


def main() -> int:
    """Run the supervisor. Exit code: 0 after a clean stop, 1 if the service could not start, 2 for a bug in pdctl,
    EXIT_PORTS_TAKEN if another plan could be started."""
    parser = argparse.ArgumentParser(prog="python -m pdctl.supervisor")
    parser.add_argument(
        "--reason-fd", type=int, default=-1, help="file descriptor on which to report why the service could not start"
    )
    parser.add_argument("--succession", type=int, default=-1, help="what the supervisor gives that became this one")
    arguments = parser.parse_args()
    reason_fd: int = arguments.reason_fd
    if reason_fd >= 0:
        os.set_inheritable(reason_fd, False)
    succession = received(arguments.succession) if arguments.succession >= 0 else None
    plan = msgspec.json.decode(sys.stdin.buffer.read() if succession is None else succession.plan, type=Plan)
    service = Service(plan, _say, succession=succession)
    code = 0
    try:
        asyncio.run(service.run())
    except* PdctlError as failures:
        failure = first_of(failures)
        assert isinstance(failure, PdctlError)
        code = _fail(reason_fd, failure.message, failure.hint or "")
        code = EXIT_PORTS_TAKEN if isinstance(failure, PortsTaken) else code
    except* Exception as failures:  # noqa: BLE001 - this is the outermost loop
        _write("".join(traceback.format_exception(failures)))
        _fail(reason_fd, f"unexpected: {type(first_of(failures)).__name__}: {first_of(failures)}")
        code = 2
    if service.failure is not None:
        code = _fail(reason_fd, f"the service did not start: {service.failure}")
    return code


def _say(name: str, message: str) -> None:
    _write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {name}: {message}\n")


def _fail(reason_fd: int, message: str, hint: str = "") -> int:
    """Report a failure to the log and to the command that started this supervisor."""
    _write(f"error: {message}\n")
    if reason_fd >= 0:
        with contextlib.suppress(OSError):  # the reader is gone
            os.write(reason_fd, json.dumps([message, hint]).encode())
    return 1


def _write(line: str) -> None:
    """Write directly to the descriptor. A full disk may lose log lines; it must not stop the service."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


sys.exit(main())
