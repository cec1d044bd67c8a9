"""`pdctl init`: write a topology that fits this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from pdctl import console
from pdctl.errors import PdctlError


def init(
    path: Path = typer.Argument(Path("pdctl.toml"), help="Where to write."),
    force: bool = typer.Option(False, "--force", help="Replace an existing file."),
    systemd: bool = typer.Option(False, "--systemd", help="Print a systemd unit that runs PATH instead."),
) -> None:
    """Write a commented topology that fits this machine (its GPUs, else its CPUs)."""
    if systemd:
        console.out(_unit(path.absolute()), end="")
        hint = "save it as ~/.config/systemd/user/pdctl.service, then: systemctl --user enable --now pdctl"
        console.note(hint)
        return
    from pdctl.commands.setup.default import default_text
    from pdctl.host import read_host

    if path.is_dir():
        raise PdctlError(f"{path} is a directory", f"name a file, such as {path / 'pdctl.toml'}")
    if path.exists() and not force:
        raise PdctlError(f"{path} exists already", "replace it with --force, or name another file")
    try:
        path.write_text(default_text(read_host()), encoding="utf-8")
    except OSError as failure:
        raise PdctlError(f"{path} cannot be written: {failure.strerror}") from failure
    console.out(str(path))
    named = "" if path == Path("pdctl.toml") else f" -f {path}"
    console.note(f"next: pdctl plan{named}    shows what it would start\n      pdctl up{named}      starts it")


def _unit(path: Path) -> str:
    """A unit that tells systemd when the service is ready, and that it lives."""
    command = f"{sys.executable} -m pdctl up --file {path}"
    return _UNIT.format(path=path, folder=path.parent, command=command)


_UNIT = """\
[Unit]
Description=pdctl: {path}
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
WorkingDirectory={folder}
# TERM to the supervisor alone: it drains and stops its processes in order. What is left after that is killed.
# With on_supervisor_death = "survive": KillMode=process, or systemd ends what shall go on.
KillMode=mixed
TimeoutStartSec=1800
TimeoutStopSec=180
WatchdogSec=30
Restart=on-failure
RestartPreventExitStatus=1
# A cgroup of our own, in which each process gets one.
Delegate=yes
LimitNOFILE=1048576
LimitMEMLOCK=infinity

[Install]
WantedBy=default.target
"""
