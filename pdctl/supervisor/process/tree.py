"""The whole tree of a child: who is in it, ended as one, proven empty.

Where cgroup v2 is writable the kernel keeps the books, and `cgroup.kill` reaches everybody. Elsewhere we are the child
subreaper: orphans below us become our children, and a stamp in their environment says whose they are. A stamp survives
double forks and new sessions, which a process group or a walk from the parent does not.
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

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_POLL_S = 0.005


class Tree(Protocol):
    """One process's tree. `join`: the cgroup.procs file that a child enters before it becomes its command."""

    join: Path | None

    def pids(self) -> list[int]:
        """Who lives in it, the leader included."""
        ...

    def kill(self) -> None:
        """SIGKILL to all of them, once."""
        ...


class SweptTree:
    """Found by its stamp (NAME=value) among all processes: slower, and the same everywhere."""

    join: Path | None = None

    def __init__(self, stamp: str) -> None:
        self._stamp = stamp

    def pids(self) -> list[int]:
        """See Tree.pids."""
        return stamped(self._stamp)

    def kill(self) -> None:
        """See Tree.kill."""
        for pid in self.pids():
            kill_quietly(pid, signal.SIGKILL)


class CgroupTree:
    """A cgroup of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.join: Path | None = folder / "cgroup.procs"

    def pids(self) -> list[int]:
        """See Tree.pids. Sub-groups that a child made are part of it."""
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
    """Makes a service's trees; `place` names the service on this machine."""

    def __init__(self, stamp_prefix: str, proc_root: Path = Path("/proc")) -> None:
        self._prefix = stamp_prefix
        place = hashlib.blake2b(stamp_prefix.encode(), digest_size=6).hexdigest()
        self._root = _new_group(f"pdctl-{os.getpid()}-{place}", proc_root)

    @property
    def method(self) -> str:
        """For people."""
        return "cgroup" if self._root else "sweep"

    def of(self, name: str) -> Tree:
        """The tree of one process."""
        if self._root is not None:
            folder = self._root / name
            with contextlib.suppress(OSError):
                # A new one for each start: recent kernels kill what is cloned into a group that was killed before.
                if folder.is_dir():
                    _remove(folder)
                folder.mkdir()
                return CgroupTree(folder)
        return SweptTree(f"{self._prefix}:{name}")

    def adopted(self, name: str, group: str) -> Tree:
        """The tree of a process that an earlier supervisor put into `group`, or into none."""
        if group and Path(group).is_dir():
            return CgroupTree(Path(group))
        return SweptTree(f"{self._prefix}:{name}")

    def close(self) -> None:
        """Remove the groups; one that is not empty stays, which says so."""
        if self._root is None:
            return
        with contextlib.suppress(OSError):
            _remove(self._root)


def become_subreaper() -> None:
    """Orphans below us become our children instead of init's, so we can wait for them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def stamped(stamp: str, proc_root: Path = Path("/proc")) -> list[int]:
    """Pids of living processes with `stamp` (NAME=value) in their environment; one that ends in a colon is a prefix."""
    wanted = stamp.encode()
    found = []
    for name in os.listdir(proc_root):  # noqa: PTH208 - hundreds of Path objects would cost more than the reading
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"{proc_root}/{name}/environ", "rb") as file:  # noqa: PTH123
                environment = file.read()
                if wanted in environment and _matches(environment.split(b"\0"), wanted) and _alive(proc_root / name):
                    found.append(int(name))
    return found


def stamps(prefix: str, proc_root: Path = Path("/proc")) -> list[str]:
    """The stamps, in order, of all living processes whose stamp begins so."""
    found = set()
    for pid in stamped(prefix, proc_root):
        with contextlib.suppress(OSError):
            environment = (proc_root / str(pid) / "environ").read_bytes().split(b"\0")
            found |= {entry.decode(errors="replace") for entry in environment if entry.startswith(prefix.encode())}
    return sorted(found)


def reap_strangers(ours: set[int]) -> None:
    """Wait for adopted orphans that have ended; never for our own children, whose exit status is wanted."""
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
    """SIGKILL until nothing is left; returns what would not die in time."""
    deadline = time.monotonic() + deadline_s
    while left := tree.pids():
        tree.kill()
        reap_strangers(ours)
        if time.monotonic() > deadline:
            return left
        await asyncio.sleep(_POLL_S)
    return []


async def end_tree(tree: Tree, wait_s: float, kill_s: float) -> list[int]:
    """Wait for a tree that was asked to end, then kill it; returns what would not die in time."""
    deadline = time.monotonic() + wait_s
    while tree.pids() and time.monotonic() < deadline:  # noqa: ASYNC110 - not our children: nobody tells us
        await asyncio.sleep(_POLL_S)
    return await kill_tree(tree, set(), kill_s)


def kill_quietly(pid: int, sign: signal.Signals) -> None:
    """A signal to somebody who may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sign)


def _remove(group: Path) -> None:
    for folder in sorted((entry for entry in group.rglob("*") if entry.is_dir()), reverse=True):
        folder.rmdir()
    group.rmdir()


def _new_group(name: str, proc_root: Path) -> Path | None:
    """A group below our own one in the cgroup v2 hierarchy; None where there is none, or it is not ours to change."""
    try:
        mounts = [line.split() for line in (proc_root / "self/mountinfo").read_text().splitlines()]
        own = next(line[3:] for line in (proc_root / "self/cgroup").read_text().splitlines() if line.startswith("0::"))
        for words in mounts:
            if words[words.index("-") + 1] == "cgroup2":
                # A mount may show only a part of the hierarchy: words[3] is its root.
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
    """Remove what supervisors that were killed left; a group in which somebody still lives stays."""
    for folder in own_group.glob("pdctl-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                _remove(folder)


def _matches(environment: list[bytes], wanted: bytes) -> bool:
    if wanted.endswith(b":"):
        return any(entry.startswith(wanted) for entry in environment)
    return wanted in environment


def _alive(process: Path) -> bool:
    try:
        stat = (process / "stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")
