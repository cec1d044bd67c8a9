"""Who gets `pdctl agent` onto the nodes of a cluster: one file per kind. "none" is systemd, or the operator.

The registry below lists the other kinds. Each module has `connect(address)`, which returns a Launcher. It runs in a
process of its own (`__main__.py`): what a launcher loads, prints and waits for does not concern the command.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from pdctl.errors import PdctlError
from pdctl.host import program

if TYPE_CHECKING:
    from pdctl.launchers.launcher import Request, Told
    from pdctl.topology.spec import Cluster, Topology

KINDS = {"ray": "pdctl.launchers.ray", "ssh": "pdctl.launchers.ssh"}
# Longer than all deadlines inside. An end includes the streams that are drained.
_START_S, _END_S = 300.0, 3600.0
_LAST_LINES = 8


def start(topology: Topology, say: Callable[[str], None]) -> list[str]:
    """Get agents onto the nodes that a cluster's topology needs, and wait until they run. Returns the nodes; none if
    the topology names no launcher. Raises PdctlError."""
    cluster = topology.cluster
    if cluster is None or cluster.launcher == "none":
        return []
    from pdctl.launchers.launcher import Request
    from pdctl.launchers.reservation import wanted_of

    say(f"asking {cluster.launcher} for agents")
    request = Request("start", cluster.launcher, _address_of(cluster), wanted=wanted_of(topology))
    told = _ask(request, cluster, _START_S)
    for note in told.notes:
        say(note)
    for agent in told.agents:
        say(f"the agent of node {agent.node} {'was running' if agent.is_adopted else 'runs'} (pid {agent.pid})")
    return [agent.node for agent in told.agents]


def give_back(topology: Topology, say: Callable[[str], None], now: bool = False) -> bool:
    """End the agents of a cluster, and return what was reserved for them. Returns whether the topology names a
    launcher, whose agents they are. Raises PdctlError."""
    cluster = topology.cluster
    if cluster is None or cluster.launcher == "none":
        return False
    from pdctl.launchers.launcher import Request

    request = Request("give_back", cluster.launcher, _address_of(cluster), service=topology.service.name, now=now)
    told = _ask(request, cluster, _END_S)
    if told.ended:
        say(f"agents ended on: {', '.join(told.ended)}")
    return True


def _ask(request: Request, cluster: Cluster, within_s: float) -> Told:
    """Have a process of its own do it. Raises PdctlError."""
    import msgspec

    from pdctl.launchers.launcher import Told

    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(
            program.part("pdctl.launchers"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise,
            env={**os.environ, **_environment(cluster)},
        )  # fmt: skip
        try:
            out, _ = child.communicate(msgspec.json.encode(request), timeout=within_s)
        except subprocess.TimeoutExpired:
            raise PdctlError(f"{request.kind} did not answer within {within_s:g} s", _last(noise)) from None
        finally:
            child.kill()
            child.wait()
        try:
            told = msgspec.json.decode(out, type=Told)
        except msgspec.DecodeError:
            what = f"the process that talks to {request.kind} exited with code {child.returncode}"
            raise PdctlError(what, _last(noise)) from None
    if told.error:
        raise PdctlError(told.error, told.hint or None)
    return told


def _address_of(cluster: Cluster) -> str:
    """What the launcher connects to."""
    return ",".join(cluster.ssh_nodes) if cluster.launcher == "ssh" else cluster.ray_address


def _environment(cluster: Cluster) -> dict[str, str]:
    """Variables that Ray reads when it is loaded. They name the file of the token, not the token."""
    if not cluster.ray_token_file:
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster.ray_token_file}


def _last(noise: BinaryIO) -> str:
    noise.seek(0)
    lines = noise.read().decode(errors="replace").strip().splitlines()
    return "its last words: " + " / ".join(lines[-_LAST_LINES:]) if lines else "it said nothing"
