"""`pdctl key`: make an API key for a service's clients."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from pdctl import console
from pdctl.errors import PdctlError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def key(
    name: str = typer.Argument(..., help="Whose key it is; shown in the access log."),
    file: Path | None = typer.Option(None, "--file", help="Append the key's line to this file (proxy.api_keys)."),
) -> None:
    """Make an API key: the key on stdout, once; its hash, which is all that is kept, in the file or on stderr."""
    import hashlib
    import os
    import secrets

    if not _NAME.fullmatch(name):
        raise PdctlError(f"{name!r} is no name for a key", "letters, digits, dots, dashes and underscores, at most 64")
    made = f"pdctl-{secrets.token_urlsafe(32)}"
    line = f"{name} sha256:{hashlib.sha256(made.encode()).hexdigest()}\n"
    if file is None:
        console.note(f"add this line to the file that proxy.api_keys names:\n{line}", end="")
    else:
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as out:
                out.write(line)
        except OSError as failure:
            raise PdctlError(f"{file} cannot be written: {failure.strerror}") from failure
    console.out(made)
