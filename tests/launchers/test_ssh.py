"""Agents started and ended by ssh: a real client and a real server; on each node `pdctl` is a script that is told
apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdctl.errors import PdctlError
from pdctl.launchers.launcher import RUNNING, Wanted
from pdctl.launchers.ssh import SshLauncher, connect
from pdctl.plan.placement import Wish
from tests.service import free_port

SSH = shutil.which("ssh")
pytestmark = pytest.mark.skipif(SSH is None, reason="NOT TESTED: no ssh")
_PDCTL = """#!/bin/sh
# A pdctl that only remembers: nodes are told apart by their folder.
echo "$*" >> {folder}/calls
case "$1" in --version) echo "pdctl 1.2.3"; exit ;; esac
case "$*" in
*--stop*)
    [ -e {folder}/runs ] || {{ echo "error: no agent of service 'chat' runs on this machine" >&2; exit 1; }}
    rm {folder}/runs; echo "the agent of chat has ended" ;;
*)
    [ ! -e {folder}/broken ] || {{ echo "error: cluster.secret_file: /s cannot be read" >&2; exit 1; }}
    [ ! -e {folder}/runs ] || {{ echo "the agent of chat runs already"; exit; }}
    cat > {folder}/file; touch {folder}/runs; echo "the agent of chat runs on node" ;;
esac
"""


@dataclass
class Nodes:
    """`folder` of each node."""

    root: Path

    def calls(self, node: str) -> list[str]:
        file = self.root / node / "calls"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Two hosts, a and b: two ports of one server."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    client = f"Host *\n UserKnownHostsFile /dev/null\n StrictHostKeyChecking no\n IdentityFile {tmp_path}/user\n"
    words = []
    for node in ("a", "b"):
        folder, port = tmp_path / node, free_port()
        folder.mkdir()
        _executable(folder / "pdctl", _PDCTL.format(folder=folder))
        client += f"Host {node}\n HostName 127.0.0.1\n Port {port}\n"
        words.append(f"{node}={port}={folder}")
    (tmp_path / "ssh_config").write_text(client + "Host away\n HostName 127.0.0.1\n Port 1\n")
    (tmp_path / "bin").mkdir()
    _executable(tmp_path / "bin" / "ssh", f'#!/bin/sh\nexec {SSH} -F {tmp_path}/ssh_config "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    files = [str(tmp_path / "host"), str(tmp_path / "user.pub")]
    argv = [sys.executable, "-m", "tests.launchers.ssh_server", *files, *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"listening\n"
            yield Nodes(tmp_path)
        finally:
            server.kill()


def _executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def wanted(*on: str) -> Wanted:
    return Wanted("chat", "the text\n'of' the file", (Wish("decode-0", "decode", "decode", nodes=on),), {"decode-0": 1})


def test_agents_are_started_once_and_ended(nodes: Nodes) -> None:
    launcher = connect("a,b")
    assert launcher.start(wanted()).is_new
    assert [(one.node, one.state, one.is_adopted, one.pdctl) for one in launcher.agents("chat")] == [
        ("a", RUNNING, False, "1.2.3"), ("b", RUNNING, False, "1.2.3"),
    ]  # fmt: skip
    assert (nodes.root / "a" / "file").read_text() == "the text\n'of' the file"
    assert nodes.calls("b")[0] == "agent -f - --node b -d --adopt"
    again = connect("a,b")
    assert not again.start(wanted()).is_new
    assert [one.is_adopted for one in again.agents("chat")] == [True, True]
    assert again.give_back("chat", now=True) == ["a", "b"]
    assert nodes.calls("a")[-1] == "agent --stop -s chat --now"
    assert again.give_back("chat", now=False) == []


def test_an_agent_that_does_not_start_is_told_with_its_own_words(nodes: Nodes) -> None:
    (nodes.root / "b" / "broken").touch()
    told = r"the agent does not run on b: cluster\.secret_file: /s cannot be read"
    with pytest.raises(PdctlError, match=told) as found:
        SshLauncher(["a", "b"]).start(wanted())
    assert found.value.hint == "its log there: logs/agent.log"


def test_a_node_that_cannot_be_reached_is_told_with_a_command_to_try(nodes: Nodes) -> None:
    with pytest.raises(PdctlError, match=r"the agent does not run on away: .*refused") as found:
        SshLauncher(["a", "away"]).start(wanted())
    assert found.value.hint == "try: ssh away pdctl --version"
    with pytest.raises(PdctlError, match="agents may run on away"):
        SshLauncher(["a", "away"]).give_back("chat", now=False)
    assert not (nodes.root / "a" / "runs").exists()


def test_engines_on_a_node_that_ssh_does_not_know_are_refused_before_anything_starts(nodes: Nodes) -> None:
    with pytest.raises(PdctlError, match="ssh_nodes has no c"):
        SshLauncher(["a", "b"]).start(wanted("a", "c"))
    assert nodes.calls("a") == []
