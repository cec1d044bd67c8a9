"""`pdctl key`: create an API key for a client."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from pdctl import console
from pdctl.errors import PdctlError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def key(
    name: str = typer.Argument(..., help="Name of the client; shown in the access log."),
    file: Path | None = typer.Option(
        None,
        "--file",
        help="Append the key's hash to this file (the one that proxy.api_keys or proxy.node_keys names).",
    ),
) -> None:
    """Create an API key. The key is printed on stdout once; only its hash is stored, in the file or on stderr."""
    import hashlib
    import os
    import secrets

    if not _NAME.fullmatch(name):
        raise PdctlError(
            f"{name!r} is not a valid key name", "use up to 64 letters, digits, dots, dashes and underscores"
        )
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
