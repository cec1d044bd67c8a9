"""`pdctl cluster`: certificates of a cluster's nodes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import typer

from pdctl import console
from pdctl.errors import PdctlError

app = typer.Typer(help="Make the certificates of a cluster's nodes, and let machines join it.", no_args_is_help=True,
                  rich_markup_mode=None, add_completion=False)  # fmt: skip

_DAYS = 90.0
_PORT = 18091
_HOUR_S = 3600.0
_Folder = typer.Argument(..., help="Folder of the CA.")
_Addresses = typer.Option([], "--address", help="IP address at which others reach the node. Repeat for several.")
_DaysOption = typer.Option(_DAYS, "--days", min=0.1, max=3650, help="How long a certificate is valid.")


@contextlib.contextmanager
def _needs_cryptography() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as failure:
        if (failure.name or "").partition(".")[0] != "cryptography":
            raise
        raise PdctlError("certificates need the package cryptography", "pip install 'pdctl[cluster]'") from None


@app.command()
def init(
    folder: Path = typer.Argument(..., help="Folder to make: keep it on one machine, and a copy in a safe place."),
    service: str = typer.Option(..., "--service", help="The service's name, as in its topology."),
) -> None:
    """Make the CA of a service's cluster, and the secret that its processes share."""
    with _needs_cryptography():
        from pdctl.commands.cluster.folder import CaFolder
    from pdctl.names.services import checked_service

    made = CaFolder.create(folder, checked_service(service))
    console.note(f"made the CA of service {service} in {folder}: whoever has {folder}/ca.key can be any node")
    console.note("then, for each node: pdctl cluster token, to let it join; or pdctl cluster certify, to copy files")
    console.out(f"sha256:{made.authority.fingerprint}")


@app.command()
def token(
    folder: Path = _Folder,
    node: str = typer.Argument(..., help="Name of the node that may join."),
    address: list[str] = _Addresses,
    hours: float = typer.Option(1.0, "--hours", min=0.01, max=720, help="How long the token may be used."),
) -> None:
    """Print a token with which one machine may join once, as this node. Without --address its certificate has the
    address that it joins from."""
    with _needs_cryptography():
        from pdctl.commands.cluster.authority import Authority, checked_addresses
        from pdctl.commands.cluster.folder import checked_node
        from pdctl.commands.cluster.tokens import Tokens
    ca = Authority.read(folder)
    ends = time.time() + hours * _HOUR_S
    made = Tokens(folder).make(ca.fingerprint, checked_node(node), checked_addresses(address), ends)
    console.out(made.text)


@app.command()
def certify(
    folder: Path = _Folder,
    node: str = typer.Argument(..., help="Name of the node."),
    address: list[str] = _Addresses,
    to: Path | None = typer.Option(None, "--to", help="Folder to write. Default: NODE, in the folder of the CA."),
    days: float = _DaysOption,
) -> None:
    """Write a node's certificate, key and secret into a folder, which you copy to it."""
    with _needs_cryptography():
        from pdctl.commands.cluster.authority import checked_addresses
        from pdctl.commands.cluster.folder import CaFolder, certify_here, checked_node
    if not address:
        raise PdctlError("a node's certificate says its addresses", "name them with --address, as 10.0.0.2")
    target = to if to is not None else folder / checked_node(node)
    certify_here(CaFolder(folder), node, checked_addresses(address), target, days)
    console.out(str(target))


@app.command()
def serve(
    folder: Path = _Folder,
    listen: str = typer.Option(..., "--listen", help="Address and port for machines that join, as 10.0.0.1:18091."),
    days: float = _DaysOption,
) -> None:
    """Let machines join with a token, and nodes renew their certificates. Ctrl-C ends it; nodes need it only then."""
    import asyncio

    with _needs_cryptography():
        from pdctl.commands.cluster.folder import CaFolder
        from pdctl.commands.cluster.joining import JoinServer
    host, port = _place(listen)

    def ready(number: int) -> None:
        console.note(f"machines join at {host}:{number} with: pdctl cluster join")

    try:
        asyncio.run(JoinServer(CaFolder(folder), days, console.note).run(host, port, ready))
    except* PdctlError as failures:
        raise failures.exceptions[0] from None


@app.command()
def join(
    at: str = typer.Argument(..., help="Where `pdctl cluster serve` listens, as 10.0.0.1:18091."),
    token_file: Path = typer.Option(..., "--token-file", help="File with the token of `pdctl cluster token`."),
    to: Path = typer.Option(..., "--to", help="Folder for this node's certificate, its key and the secret."),
) -> None:
    """Join a cluster: get this node's certificate and the service's secret with a token."""
    node = join_as(at, token_file, to, to / "secret")
    console.note(
        f"this machine is node {node}: set certificates and secret_file under [cluster] to {to} and {to}/secret"
    )
    console.out(node)


def join_as(at: str, token_file: Path, folder: Path, secret_file: Path) -> str:
    """Join, and return the node's name. Raises PdctlError."""
    import asyncio

    with _needs_cryptography():
        from pdctl.commands.cluster.joining import join as joined
        from pdctl.commands.cluster.tokens import read_token
    host, port = _place(at)
    return asyncio.run(joined(host, port, read_token(token_file), folder, secret_file))


@app.command()
def renew(
    folder: Path = typer.Argument(..., help="This node's folder."),
    ca: Path | None = typer.Option(None, "--ca", help="Folder of the CA, if it is on this machine."),
    now: bool = typer.Option(False, "--now", help="Renew also before half of the certificate's life is over."),
    days: float = _DaysOption,
) -> None:
    """Renew a node's certificate, if half of its life is over: for a timer, such as once an hour. Running processes use
    the new one without a restart."""
    import asyncio

    with _needs_cryptography():
        from pdctl.commands.cluster import folder as folders
        from pdctl.commands.cluster.joining import renew as renewed
    is_due, ends = folders.is_due(folder)
    if not (is_due or now):
        console.note(f"nothing to do: the certificate is valid until {ends}")
        return
    if ca is not None:
        folders.renew_here(folders.CaFolder(ca), folder, days)
    else:
        asyncio.run(renewed(*_place(folders.joined_at(folder)), folder))
    console.note(f"renewed: the certificate is valid until {folders.is_due(folder)[1]}")


def _place(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise PdctlError(f"{text!r} is not HOST:PORT", f"such as 10.0.0.1:{_PORT}")
    return host.strip("[]"), int(port)
