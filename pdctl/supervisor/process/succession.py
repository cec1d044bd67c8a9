"""What a supervisor gives to the one that it becomes: another version of pdctl in the same process.

`execve` keeps the pid, the children and the descriptors that are marked for it. So no process of the service notices,
and clients' connections have their keeper all the time. See pdctl/supervisor/service/change/upgrade.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from pdctl.errors import PdctlError
from pdctl.host import program
from pdctl.net.keeping import TakenOver

# They wait until the new version has its handlers: by default they would end the process, and the service with it.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# They name packages of another interpreter.
_OF_AN_INTERPRETER = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


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
        env = dict(os.environ)
        if argv[0] != program.executable():
            env = {name: value for name, value in env.items() if name not in _OF_AN_INTERPRETER}
        os.execve(argv[0], [*argv, "--succession", str(told)], env)  # noqa: S606 - becoming the command is the point
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for descriptor in open_ones:
            os.set_inheritable(descriptor, False)
        os.close(told)


def received(descriptor: int) -> Succession:
    """What the supervisor was given that this process was before. Raises PdctlError."""
    with os.fdopen(descriptor, "rb") as told:
        told.seek(0)
        try:
            given = msgspec.json.decode(told.read(), type=Succession)
        except msgspec.DecodeError as failure:
            raise PdctlError(
                f"the supervisor of before is of a version that cannot be succeeded: {failure}"
            ) from failure
    for one in given.descriptors:
        os.set_inheritable(one, False)
    return given


def refusal(argv: Sequence[str]) -> str:
    """Why this cannot be executed, or ""."""
    if not argv or not Path(argv[0]).is_absolute() or not os.access(argv[0], os.X_OK):
        return f"{argv[0] if argv else 'nothing'} cannot be executed"
    return ""
