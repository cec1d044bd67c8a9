"""The process tree of a child: list it, kill all of it, and verify that it is empty.

If cgroup v2 is writable, the kernel tracks the members and `cgroup.kill` reaches all of them. Otherwise the supervisor
is the child subreaper: orphaned descendants become its children, and a stamp in their environment names the process
they belong to. A stamp survives double forks and new sessions; a process group or a walk from the parent does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Protocol

from pdctl.host.processes.stamps import stamped

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_POLL_S = 0.005


class Tree(Protocol):
    """One process's tree. `join`: the cgroup.procs file that a child writes itself to before exec; `session`: the
    session of its leader, 0 before it is started."""

    join: Path | None
    session: int

    def pids(self) -> list[int]:
        """The pids of all living members, including the leader."""
        ...

    def kill(self) -> None:
        """Send SIGKILL to all members once."""
        ...


class SweptTree:
    """Members are found by their stamp (NAME=value) among all processes: slower, but works everywhere."""

    join: Path | None = None

    def __init__(self, stamp: str) -> None:
        self._stamp = stamp
        self.session = 0

    def pids(self) -> list[int]:
        """See Tree.pids."""
        return stamped(self._stamp, session=self.session)

    def kill(self) -> None:
        """See Tree.kill."""
        for pid in self.pids():
            kill_quietly(pid, signal.SIGKILL)


class CgroupTree:
    """A cgroup of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.join: Path | None = folder / "cgroup.procs"
        self.session = 0

    def pids(self) -> list[int]:
        """See Tree.pids. Includes sub-groups that a child created."""
        try:
            if "populated 0" in (self._folder / "cgroup.events").read_text():
                return []
            found = [int(pid) for file in self._folder.rglob("cgroup.procs") for pid in file.read_text().split()]
        except FileNotFoundError:
            return []
        return found

    def kill(self) -> None:
        """See Tree.kill."""
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "cgroup.kill").write_text("1")


class Trees:
    """Creates a service's trees; `place` identifies the service on this machine."""

    def __init__(self, stamp_prefix: str, proc_root: Path = Path("/proc")) -> None:
        self._prefix = stamp_prefix
        place = hashlib.blake2b(stamp_prefix.encode(), digest_size=6).hexdigest()
        self._root = _new_group(f"pdctl-{os.getpid()}-{place}", proc_root)

    @property
    def method(self) -> str:
        """The method, as shown to users."""
        return "cgroup" if self._root else "sweep"

    def of(self, name: str) -> Tree:
        """The tree of one process."""
        if self._root is not None:
            folder = self._root / name
            with contextlib.suppress(OSError):
                # A new group for each start: recent kernels kill a process cloned into a group that was killed before.
                if folder.is_dir():
                    _remove(folder)
                folder.mkdir()
                return CgroupTree(folder)
        return SweptTree(f"{self._prefix}:{name}")

    def adopted(self, name: str, group: str) -> Tree:
        """The tree of a process that an earlier supervisor put into `group`; "" for none."""
        if group and Path(group).is_dir():
            return CgroupTree(Path(group))
        return SweptTree(f"{self._prefix}:{name}")

    def close(self) -> None:
        """Remove the groups. One that is not empty stays."""
        if self._root is None:
            return
        with contextlib.suppress(OSError):
            _remove(self._root)


def become_subreaper() -> None:
    """Make orphaned descendants children of this process instead of init, so that it can wait for them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_strangers(ours: set[int]) -> None:
    """Reap orphans that have exited, but never direct children: their exit status is still needed."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in ours:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(ended.si_pid, 0)


async def kill_tree(tree: Tree, ours: set[int], deadline_s: float) -> list[int]:
    """Send SIGKILL until the tree is empty. Returns the pids that did not exit in time."""
    deadline = time.monotonic() + deadline_s
    while left := tree.pids():
        tree.kill()
        reap_strangers(ours)
        if time.monotonic() > deadline:
            return left
        await asyncio.sleep(_POLL_S)
    return []


async def end_tree(tree: Tree, wait_s: float, kill_s: float) -> list[int]:
    """Wait for a tree that was told to stop, then kill it. Returns the pids that did not exit in time."""
    deadline = time.monotonic() + wait_s
    while tree.pids() and time.monotonic() < deadline:  # noqa: ASYNC110 - not our children: no notification
        await asyncio.sleep(_POLL_S)
    return await kill_tree(tree, set(), kill_s)


def kill_quietly(pid: int, sign: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sign)


def _remove(group: Path) -> None:
    for folder in sorted((entry for entry in group.rglob("*") if entry.is_dir()), reverse=True):
        folder.rmdir()
    group.rmdir()


def _new_group(name: str, proc_root: Path) -> Path | None:
    """A new group below this process's own in the cgroup v2 hierarchy; None if there is none or it is not writable."""
    try:
        mounts = [line.split() for line in (proc_root / "self/mountinfo").read_text().splitlines()]
        own = next(line[3:] for line in (proc_root / "self/cgroup").read_text().splitlines() if line.startswith("0::"))
        for words in mounts:
            if words[words.index("-") + 1] == "cgroup2":
                # A mount may contain only a part of the hierarchy: words[3] is its root.
                inside = own.removeprefix(words[3]) if words[3] != "/" else own
                own_group = Path(words[4]) / inside.lstrip("/")
                _sweep(own_group)
                folder = own_group / name
                folder.mkdir(exist_ok=True)
                if (folder / "cgroup.kill").exists():
                    return folder
                folder.rmdir()
    except (OSError, StopIteration, ValueError):
        return None
    return None


def _sweep(own_group: Path) -> None:
    """Remove the groups left by killed supervisors; groups with living processes stay."""
    for folder in own_group.glob("pdctl-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                _remove(folder)
