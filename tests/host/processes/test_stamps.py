"""Processes found by their stamp: real ones, also those that have overwritten their environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from pdctl.host.processes.stamps import stamp_of, stamped, stamps

NAME = "PDCTL_TEST_STAMP"
# What setproctitle does to the environment that the kernel shows: vLLM's workers use it.
WIPE = """
import ctypes
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
start, end = int(fields[47]), int(fields[48])
ctypes.memset(start, 0, end - start)
"""
# A leader that starts a child in its session, tells the child's pid, and waits for its standard input to close.
LEADER = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WIPE!r} + "print(flush=True); sys_in = open(0).read()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


class Tree:
    """A leader in a session of its own, and its child, which has overwritten its environment."""

    def __init__(self) -> None:
        self.stamp = f"{uuid4().hex}:engine"
        self.leader = subprocess.Popen(
            [sys.executable, "-c", LEADER], env={**os.environ, NAME: self.stamp}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self.leader.stdout is not None
        self.child = int(self.leader.stdout.readline())

    @property
    def entry(self) -> str:
        return f"{NAME}={self.stamp}"

    def end(self) -> None:
        self.leader.kill()
        self.leader.communicate()


@pytest.fixture
def tree() -> Iterator[Tree]:
    made = Tree()
    yield made
    made.end()
    for pid in stamped(made.entry, session=made.leader.pid):
        os.kill(pid, 9)


def test_a_child_without_its_environment_belongs_to_its_session(tree: Tree) -> None:
    assert NAME.encode() not in Path(f"/proc/{tree.child}/environ").read_bytes()
    assert sorted(stamped(tree.entry)) == sorted([tree.leader.pid, tree.child])
    assert sorted(stamped(f"{NAME}={tree.stamp.partition(':')[0]}:")) == sorted([tree.leader.pid, tree.child])
    assert stamps(f"{NAME}={tree.stamp.partition(':')[0]}:") == [tree.entry]
    assert stamp_of(tree.child, NAME) == tree.stamp
    assert stamp_of(os.getpid(), NAME) == ""


def test_it_is_found_by_the_session_when_its_leader_is_gone(tree: Tree) -> None:
    os.kill(tree.child, 19)  # stopped: it cannot notice that its leader is gone
    tree.end()
    assert stamped(tree.entry) == [], "nothing with the stamp is left"
    assert stamped(tree.entry, session=tree.leader.pid) == [tree.child]


def test_the_session_of_a_stranger_is_left_alone(tree: Tree) -> None:
    """A process with the stamp in a session whose leader has none, such as a login shell, brings in nobody else."""
    command = [sys.executable, "-c", WIPE + "print(flush=True); open(0).read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        with subprocess.Popen([*command[:2], "print(flush=True); open(0).read()"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, env={**os.environ, NAME: "x"}) as ours:  # fmt: skip
            assert ours.stdout is not None
            ours.stdout.readline()
            found = stamped(f"{NAME}=x")
            ours.communicate()
        assert found == [ours.pid]
        stranger.communicate()
