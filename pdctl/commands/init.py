"""`pdctl init`: write a topology that fits this machine."""

from __future__ import annotations

from pathlib import Path

import typer

from pdctl import console
from pdctl.errors import PdctlError


def init(
    path: Path = typer.Argument(Path("pdctl.toml"), help="Where to write."),
    force: bool = typer.Option(False, "--force", help="Replace an existing file."),
) -> None:
    """Write a commented topology that fits this machine (its GPUs, else its CPUs)."""
    from pdctl.commands.default import default_text
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
