"""What a supervisor gives to the one that it becomes: another version of pdctl in the same process.

`execve` keeps the pid, the children and the descriptors that are marked for it. So no process of the service notices,
and clients' connections have their keeper all the time. See pdctl/supervisor/service/change/upgrade.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from pdctl.errors import PdctlError
from pdctl.host import program
from pdctl.host.processes.subprocesses import last_line, started
from pdctl.net.keeping import TakenOver
from pdctl.plan import Plan
from pdctl.supervisor.rundir.adoption import read_adoptable

# They wait until the new version has its handlers: by default they would end the process, and the service with it.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# They name packages of another interpreter.
_OF_AN_INTERPRETER = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


# The trial of a version may take so long, seconds; it needs less than one.
_TRIAL_S = 30.0
_WORKS = b"ok"


class KeptSocket(msgspec.Struct, frozen=True, array_like=True):
    """A listening socket, as a descriptor."""

    host: str
    port: int
    descriptor: int


class KeptConnections(msgspec.Struct, frozen=True):
    """A keeper, with the descriptors of its journal, of the channel to its proxy (-1: none) and of connections, by
    cookie."""

    name: str
    slots: int
    memory: int
    channel: int
    connections: dict[int, int]
    had: int
    crashed: bool
    takeovers: int
    uncovered: int
    refused: int
    total: TakenOver


class Succession(msgspec.Struct, frozen=True):
    """`plan`: the wanted plan, as the new version reads it."""

    plan: msgspec.Raw
    sockets: list[KeptSocket]
    keepers: list[KeptConnections]

    @property
    def descriptors(self) -> Iterable[int]:
        """All that must stay open."""
        yield from (kept.descriptor for kept in self.sockets)
        for keeper in self.keepers:
            yield from filter(lambda descriptor: descriptor >= 0, (keeper.memory, keeper.channel))
            yield from keeper.connections.values()


def become(argv: Sequence[str], given: Succession) -> None:
    """Become the supervisor `argv`, which gets the option --succession FD. Raises OSError; otherwise never returns."""
    told = os.memfd_create("pdctl-succession", 0)
    open_ones = [*given.descriptors]
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        os.write(told, msgspec.json.encode(given))
        for descriptor in open_ones:
            os.set_inheritable(descriptor, True)
        os.execve(argv[0], [*argv, "--succession", str(told)], _env_of(argv))  # noqa: S606 - becoming it is the point
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for descriptor in open_ones:
            os.set_inheritable(descriptor, False)
        os.close(told)


async def tried(argv: Sequence[str], given: Succession) -> str:
    """Have the supervisor `argv` read what it would be given, in a process of its own. Returns why it cannot, or ""."""
    try:
        async with asyncio.timeout(_TRIAL_S), started([*argv, "--try"], env=_env_of(argv)) as trial:
            out, said = await trial.communicate(msgspec.json.encode(given))
    except TimeoutError:
        return f"has not read within {_TRIAL_S:g} s what it would go on with"
    except OSError as failure:
        return failure.strerror or str(failure)
    # Its exit code may be unknown: the supervisor reaps every child that it does not know.
    return "" if out.strip() == _WORKS else last_line(said, trial.returncode)


def say_if_it_works(data: bytes) -> None:
    """The trial, in the process that was started for it: raises PdctlError if this version cannot go on."""
    plan = read_plan(decoded(data))
    if read_adoptable(Path(plan.run_dir), is_succession=True) is None:
        raise PdctlError("the files of the running processes are of a version that cannot be succeeded")
    os.write(1, _WORKS + b"\n")


def received(descriptor: int) -> Succession:
    """What the supervisor was given that this process was before. Raises PdctlError."""
    with os.fdopen(descriptor, "rb") as told:
        told.seek(0)
        given = decoded(told.read())
    for one in given.descriptors:
        os.set_inheritable(one, False)
    return given


def decoded(data: bytes) -> Succession:
    """Raises PdctlError."""
    try:
        return msgspec.json.decode(data, type=Succession)
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise PdctlError(f"the supervisor of before is of a version that cannot be succeeded: {failure}") from failure


def read_plan(given: Succession) -> Plan:
    """The wanted plan. Raises PdctlError."""
    try:
        return msgspec.json.decode(given.plan, type=Plan)
    except msgspec.DecodeError as failure:
        raise PdctlError(f"the plan is of another version than this supervisor: {failure}") from failure


def _env_of(argv: Sequence[str]) -> dict[str, str]:
    without = () if argv[0] == program.executable() else _OF_AN_INTERPRETER
    return {name: value for name, value in os.environ.items() if name not in without}


def refusal(argv: Sequence[str]) -> str:
    """Why this cannot be executed, or ""."""
    if not argv or not Path(argv[0]).is_absolute() or not os.access(argv[0], os.X_OK):
        return f"{argv[0] if argv else 'nothing'} cannot be executed"
    return ""
