"""Every test leaves the machine as it found it: processes, descriptors, ports."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.service import Run

# scripts/demo tells its user to export it: tests have services of their own.
os.environ.pop("PDCTL_FILE", None)


def _descriptors() -> dict[int, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:
            continue
    return found


def _listening() -> set[int]:
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    ports = set()
    for process in mine:
        try:
            connections = process.net_connections(kind="tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        ports |= {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    return ports


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test that leaks a child process, a socket or memory file, or a listening port."""
    before = (set(psutil.Process().children(recursive=True)), _descriptors(), _listening())
    yield
    if {"service", "ours", "quiet"} & set(request.fixturenames):
        return  # what a module shares is checked when the module ends: services by `running`, transports by a test
    gc.collect()
    children = {
        child
        for child in psutil.Process().children(recursive=True)
        if child not in before[0] and child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    }
    assert not children, f"leaked processes: {children}"
    kinds = ("socket:", "/memfd:pdctl", "anon_inode:[pidfd]")
    leaked = {fd: name for fd, name in _descriptors().items() if fd not in before[1] and name.startswith(kinds)}
    assert not leaked, f"leaked descriptors: {leaked}"
    assert _listening() <= before[2], "leaked listening ports"


@contextmanager
def _run() -> Iterator[Run]:
    # Short: a unix socket path has 107 bytes, and pytest's own folders are long.
    made = Run(Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp")))
    yield made
    left = made.processes()
    for process in left:
        process.kill()
    shutil.rmtree(made.folder, ignore_errors=True)
    assert not left, f"left running: {left}"


@pytest.fixture
def run() -> Iterator[Run]:
    """A directory for one test's service; whatever still runs at the end is a failure."""
    with _run() as made:
        yield made


@pytest.fixture(scope="module")
def module_run() -> Iterator[Run]:
    """The same for a whole module."""
    with _run() as made:
        yield made


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The tiny sample's directory, made if it is missing."""
    from pdctl.engine.samples.prepare import prepare
    from pdctl.host.models import locate_model
    from pdctl.host.users import cache_root

    located = locate_model("sample:tiny-qwen3", cache_root())
    return Path(prepare(located.spec, located.path, lambda what, fraction: None))
