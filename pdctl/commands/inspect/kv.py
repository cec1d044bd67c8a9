"""`pdctl kv`: all leases on KV, and the leaked ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FileOption, JsonOption, ServiceOption, as_json_text, control, find_service
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.control_api import EngineBlocks, KvStatus, Lease

_COLOURS = {"its holder is gone": "red", "its holder is silent": "red"}


def kv(
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    leaks: bool = typer.Option(False, "--leaks", help="Only leaked leases: the holder is gone or does not answer."),
    revoke: str | None = typer.Option(None, "--revoke", metavar="LEASE", help="Revoke a lease and free its blocks."),
    as_json: bool = JsonOption,
) -> None:
    """Show the KV blocks of each engine and the leases on them."""
    name = find_service(service, file)
    if revoke is not None:
        _revoke(name, revoke, as_json)
        return
    found = control(name).leases()
    if leaks:
        found = found.leaks_alone()
    if as_json:
        console.out(as_json_text(found))
    else:
        _show(found, leaks)
    for engine, reason in found.unreachable.items():
        console.note(f"{engine} did not answer: {reason}")


def _revoke(service: str, lease: str, as_json: bool) -> None:
    reply = control(service).revoke(lease)
    if not reply.ok:
        raise PdctlError(reply.reason, "list the leases with: pdctl kv")
    if as_json:
        console.out(as_json_text(reply, indent=None))
    console.note(f"lease {lease} is revoked; its request will be prefilled again")


def _show(found: KvStatus, leaks: bool) -> None:
    if not leaks:
        header = ["ENGINE", "BLOCKS", "FREE", "CACHED", "IN USE", "LEASED", "QUARANTINED"]
        console.out(console.table(header, [_engine(engine) for engine in found.engines]))
        for engine in found.engines:
            counted = [f"{name.replace('_', ' ')} {count}" for name, count in engine.counters.items() if count]
            if counted:
                console.out(f"{engine.name}: {', '.join(counted)} since its start")
        console.out()
    if not found.leases:
        console.out("no leaked leases" if leaks else "no leases")
        return
    header = ["LEASE", "ENGINE", "HOLDER", "REQUEST", "STATE", "AGE", "BLOCKS", "SIZE", "LEAK"]
    console.out(console.table(header, [_lease(lease) for lease in found.leases], _COLOURS))


def _engine(engine: EngineBlocks) -> list[str]:
    blocks = (
        engine.blocks_total,
        engine.blocks_free,
        engine.blocks_cached,
        engine.blocks_referenced,
        engine.blocks_leased,
        engine.blocks_quarantined,
    )
    return [engine.name, *map(str, blocks)]


def _lease(lease: Lease) -> list[str]:
    return [
        lease.id,
        lease.engine,
        lease.holder,
        lease.request_id,
        lease.state,
        console.duration(lease.age_s),
        str(lease.blocks),
        f"{lease.bytes / 2**20:.1f}M",
        lease.leak or "-",
    ]
