"""What a launcher does on a node, by whatever means it got there: keep the agent of a service alive."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from pdctl.errors import PdctlError
from pdctl.host import program
from pdctl.host.devices.gpu import read_gpus
from pdctl.host.processes.presence import supervisor_of
from pdctl.host.users import run_root, state_root
from pdctl.launchers.daemon import Daemon, start_daemon
from pdctl.launchers.environment import environment_of, parse_environment, reserved_gpus
from pdctl.launchers.keeper import Keeper, Kept
from pdctl.names.services import checked_service

_GPUS = "CUDA_VISIBLE_DEVICES"
_LAST_LINES, _LAST_BYTES = 3, 4000


class Launch(msgspec.Struct, frozen=True):
    """One agent. `file`: the text of its topology file; `gpus`: how many were reserved for it."""

    service: str
    node: str
    file: str
    gpus: int = 0
    allow_commands: bool = False


def keeper_of(launch: Launch, host_process: int) -> Keeper:
    """Keeps an agent alive on this machine. `host_process`: the raylet, which has the node's own environment."""
    run_dir = run_root() / checked_service(launch.service)
    log = _log_of(launch.service)
    return Keeper(
        Kept(
            launch.node,
            find=lambda: supervisor_of(run_dir),
            start=lambda: _start(launch, log, host_process),
            last_words=lambda: _last_words(log),
        )
    )


def file_of(service: str) -> Path:
    """The topology file of an agent that was launched."""
    return state_root() / service / "agent.toml"


def control_group(service: str) -> Path | None:
    """The folder of the control group that an agent was moved into; None if there is none."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place) / _group(service)
    return None


def write_file(service: str, text: str) -> Path:
    """Keep the topology file of an agent. Raises PdctlError."""
    file = file_of(service)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = file.with_suffix(".tmp")
        scratch.write_text(text)
        scratch.replace(file)
    except OSError as failure:
        raise PdctlError(f"{file} cannot be written: {failure.strerror}") from failure
    return file


def _start(launch: Launch, log: Path, host_process: int) -> Daemon:
    """Raises PdctlError."""
    file = write_file(launch.service, launch.file)
    words = ["agent", "-f", str(file), "--node", launch.node]
    argv = program.pdctl(*words, *(["--allow-commands"] if launch.allow_commands else []))
    gpus = read_gpus()
    env = environment_of(
        _environment(host_process), os.environ, reserved_gpus(gpus, os.environ.get(_GPUS) if launch.gpus else None)
    )
    started = start_daemon(argv, env, log, _group(launch.service), [host_process, os.getpid()])
    if launch.gpus <= len(gpus):
        return started
    note = f"{launch.gpus} GPUs are reserved, but pdctl finds {len(gpus)} there"
    return Daemon(started.pid, (*started.notes, note))


def _environment(pid: int) -> dict[str, str] | None:
    """The environment that a process was started with; None if it is not ours to read."""
    try:
        return parse_environment(Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:
        return None


def _last_words(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as failure:
        return f"it ended, and {log} cannot be read: {failure.strerror}"
    return " / ".join(text.strip().splitlines()[-_LAST_LINES:]) or "it ended without a word"


def _log_of(service: str) -> Path:
    return state_root() / service / "logs" / "agent.log"


def _group(service: str) -> str:
    return f"pdctl.{service}"
