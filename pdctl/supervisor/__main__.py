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
from pdctl.supervisor.process.succession import read_plan, received, say_if_it_works
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
    parser.add_argument("--try", dest="tries", action="store_true", help="only read what would be given, from stdin")
    arguments = parser.parse_args()
    reason_fd: int = arguments.reason_fd
    if reason_fd >= 0:
        os.set_inheritable(reason_fd, False)
    try:
        if arguments.tries:
            say_if_it_works(sys.stdin.buffer.read())
            return 0
        service = _service(arguments.succession)
    except PdctlError as failure:
        return _fail(reason_fd, failure.message, failure.hint or "")
    return _run(service, reason_fd)


def _service(succession: int) -> Service:
    """The service that is told on stdin, or by the supervisor that this process was before. Raises PdctlError."""
    if succession < 0:
        return Service(msgspec.json.decode(sys.stdin.buffer.read(), type=Plan), _say)
    given = received(succession)
    return Service(read_plan(given), _say, succession=given)


def _run(service: Service, reason_fd: int) -> int:
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
