"""The process that talks to a launcher: a request on stdin, the answer on stdout."""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import cast

import msgspec

from pdctl import __version__
from pdctl.errors import PdctlError
from pdctl.launchers import KINDS
from pdctl.launchers.launcher import RUNNING, WAITING, Launcher, Request, Standing, Told

# All agents must run after so long, seconds.
_AGENTS_S = 180.0
_POLL_S = 0.1


def main() -> None:
    """Do what stdin asks for. Whatever else is printed goes to stderr."""
    answer = os.dup(1)
    os.dup2(2, 1)
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    try:
        told = done(request, _connected(request))
    except PdctlError as failure:
        told = Told(error=failure.message, hint=failure.hint or "")
    with os.fdopen(answer, "wb") as out:
        out.write(msgspec.json.encode(told))


def done(request: Request, launcher: Launcher) -> Told:
    """Do what a request asks for. Raises PdctlError."""
    if request.verb == "give_back":
        return Told(ended=launcher.give_back(request.service, request.now))
    assert request.wanted is not None
    service = request.wanted.service
    started = launcher.start(request.wanted)
    try:
        agents = _all_running(launcher, service)
    except PdctlError:
        if started.is_new:
            launcher.give_back(service, now=True)
        raise
    return Told(agents, [*started.notes, *_notes(agents)])


def _all_running(launcher: Launcher, service: str) -> list[Standing]:
    """How all agents are as soon as they run. Raises PdctlError."""
    deadline = time.monotonic() + _AGENTS_S
    while True:
        agents = launcher.agents(service)
        for agent in agents:
            if agent.state == WAITING:
                hint = f"what it said is on that node, in logs/agent.log of {service}"
                raise PdctlError(f"the agent of node {agent.node} does not run: {agent.reason}", hint)
        late = [agent for agent in agents if agent.state != RUNNING]
        if agents and not late:
            return agents
        if time.monotonic() > deadline:
            named = ", ".join(f"{agent.node} ({agent.reason or agent.state})" for agent in late)
            raise PdctlError(f"agents did not run within {_AGENTS_S:g} s on: {named}")
        time.sleep(_POLL_S)


def _notes(agents: list[Standing]) -> list[str]:
    found = [f"node {agent.node}: {note}" for agent in agents for note in agent.notes]
    other = [f"{agent.node} ({agent.pdctl})" for agent in agents if agent.pdctl != __version__]
    if other:
        found.append(f"nodes with another version of pdctl than {__version__}: {', '.join(other)}")
    return found


def _connected(request: Request) -> Launcher:
    """Raises PdctlError."""
    try:
        module = importlib.import_module(KINDS[request.kind])
    except ModuleNotFoundError as failure:
        hint = f"on every node: pip install 'pdctl[{request.kind}]'"
        raise PdctlError(f"launcher {request.kind!r} cannot be used: {failure}", hint) from failure
    return cast(Launcher, module.connect(request.address))


if __name__ == "__main__":
    main()
