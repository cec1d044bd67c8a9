"""`pdctl kv`: every lease on KV, and those that nobody needs any more."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import typer

from pdctl import console
from pdctl.commands.common import FileOption, JsonOption, ServiceOption, Status, call, find_service
from pdctl.errors import PdctlError

_COLOURS = {"its holder is gone": "red", "its holder is silent": "red"}


def kv(
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    leaks: bool = typer.Option(False, "--leaks", help="Only leases whose holder is gone or silent."),
    revoke: str | None = typer.Option(None, "--revoke", metavar="LEASE", help="Take a lease back and free its blocks."),
    as_json: bool = JsonOption,
) -> None:
    """Show KV blocks per engine, and who holds leases on them."""
    name = find_service(service, file)
    if revoke is not None:
        _revoke(name, revoke, as_json)
        return
    found = call(name, "GET", "/v1/kv")
    if leaks:
        found["leases"] = [lease for lease in found["leases"] if lease["leak"]]
    if as_json:
        console.out(json.dumps(found, indent=2))
    else:
        _show(found, leaks)
    for engine, reason in found["unreachable"].items():
        console.note(f"{engine} did not answer: {reason}")


def _revoke(service: str, lease: str, as_json: bool) -> None:
    reply = call(service, "POST", f"/v1/kv/revoke?lease={quote(lease, safe='')}")
    if not reply["ok"]:
        raise PdctlError(reply["reason"], "list the leases with: pdctl kv")
    if as_json:
        console.out(json.dumps(reply))
    console.note(f"lease {lease} is revoked; its request prefills again")


def _show(found: Status, leaks: bool) -> None:
    if not leaks:
        header = ["ENGINE", "BLOCKS", "FREE", "CACHED", "IN USE", "LEASED", "QUARANTINED"]
        keys = ("total", "free", "cached", "referenced", "leased", "quarantined")
        rows = [[e["name"], *(str(e[f"blocks_{key}"]) for key in keys)] for e in found["engines"]]
        console.out(console.table(header, rows))
        console.out()
    if not found["leases"]:
        console.out("no leaked leases" if leaks else "no leases")
        return
    header = ["LEASE", "ENGINE", "HOLDER", "REQUEST", "STATE", "AGE", "BLOCKS", "SIZE", "LEAK"]
    console.out(console.table(header, [_lease(lease) for lease in found["leases"]], _COLOURS))


def _lease(lease: Status) -> list[str]:
    return [
        lease["id"],
        lease["engine"],
        lease["holder"],
        lease["request_id"],
        lease["state"],
        console.duration(lease["age_s"]),
        str(lease["blocks"]),
        f"{lease['bytes'] / 2**20:.1f}M",
        lease["leak"] or "-",
    ]
