"""ssh gets agents onto nodes: one command on each, at the start and at the end. Nothing watches them meanwhile.

How a node is reached (user, port, key, jump host) is said in ssh's own configuration. A password is never asked for.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pdctl.errors import PdctlError
from pdctl.launchers.launcher import RUNNING, Standing, Started, Wanted

# Seconds: for a connection, for an agent to answer, and for one to drain and end.
_CONNECT_S, _START_S, _END_S = 10, 60.0, 700.0
_AT_ONCE = 32
# ssh's own exit code, for a connection that failed. Others are those of the command.
_NOT_REACHED = 255
_NOT_RUNNING = "no agent of service"


@dataclass(frozen=True, slots=True)
class _Done:
    """How a command ended on a node. `said`: what it wrote to stdout; `error`: its last words, or ssh's."""

    code: int
    said: str
    error: str


def connect(address: str) -> SshLauncher:
    """`address`: nodes, with commas between them."""
    return SshLauncher([node for node in address.split(",") if node])


class SshLauncher:
    """See Launcher. `nodes`: hosts as ssh knows them; their names are the names of the nodes."""

    def __init__(self, nodes: list[str]) -> None:
        self._nodes = nodes
        self._standing: dict[str, Standing] = {}

    def start(self, wanted: Wanted) -> Started:
        """See Launcher. An agent that runs already goes on."""
        named = {node for wish in wanted.engines for node in wish.nodes} | set(wanted.proxies)
        if unknown := named - set(self._nodes):
            hint = "add them to ssh_nodes, by the names that ssh has for them"
            raise PdctlError(f"ssh_nodes has no {', '.join(sorted(unknown))}", hint)

        def begin(node: str) -> _Done:
            words = ["pdctl", "agent", "-f", "-", "--node", node, "-d", "--adopt"]
            words += ["--allow-commands"] if wanted.allow_commands else []
            return _run(node, words, wanted.file, _START_S)

        done = self._all(begin)
        _refuse({node: one for node, one in done.items() if one.code}, "the agent does not run on")
        self._standing = {
            node: Standing(node, RUNNING, is_adopted="already" in one.said, pdctl=self._version(node))
            for node, one in done.items()
        }
        return Started(not all(standing.is_adopted for standing in self._standing.values()))

    def agents(self, service: str) -> list[Standing]:
        """See Launcher: as they were started."""
        return list(self._standing.values())

    def give_back(self, service: str, now: bool) -> list[str]:
        """See Launcher."""

        def end(node: str) -> _Done:
            return _run(node, ["pdctl", "agent", "--stop", "-s", service, *(["--now"] if now else [])], "", _END_S)

        done = self._all(end)
        failed = {node: one for node, one in done.items() if one.code and _NOT_RUNNING not in one.error}
        _refuse(failed, "agents may run on")
        return [node for node, one in done.items() if one.code == 0]

    def _all(self, act: Callable[[str], _Done]) -> dict[str, _Done]:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            return dict(zip(self._nodes, threads.map(act, self._nodes), strict=True))

    def _version(self, node: str) -> str:
        done = _run(node, ["pdctl", "--version"], "", _START_S)
        return done.said.split()[-1] if done.code == 0 and done.said else ""


def _run(node: str, words: list[str], text: str, within_s: float) -> _Done:
    """Run a command on a node, with `text` on its stdin."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}", "-o", "ServerAliveInterval=10", "-T"]
    program = shutil.which("ssh")
    if program is None:
        raise PdctlError("launcher ssh needs the command ssh", "install OpenSSH's client")
    try:
        done = subprocess.run(
            [program, *options, "--", node, shlex.join(words)], input=text, capture_output=True,
            encoding="utf-8", errors="replace", timeout=within_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return _Done(_NOT_REACHED, "", f"no end within {within_s:g} s")
    lines = [line for line in done.stderr.strip().splitlines() if line]
    error = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "it said nothing")
    return _Done(done.returncode, done.stdout.strip(), error.removeprefix("error: "))


def _refuse(failed: dict[str, _Done], what: str) -> None:
    """Raise PdctlError if there is a failure."""
    if not failed:
        return
    listed = "; ".join(f"{node}: {done.error}" for node, done in failed.items())
    reached = all(done.code != _NOT_REACHED for done in failed.values())
    hint = "its log there: logs/agent.log" if reached else f"try: ssh {next(iter(failed))} pdctl --version"
    raise PdctlError(f"{what} {listed}", hint)
