"""Loaded by every Python process of a chaos run (PYTHONPATH): failpoints in the hand-over, and disabled safeguards.

A failpoint fires if the driver has created a file `ENGINE.POINT` in CHAOS_DIR; its text is the action. CHAOS_SABOTAGE
names one safeguard to disable, to show that the suite detects this. None of this is part of the product.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.abc
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:  # every Python process loads this file, and most never need pdctl
    from pdctl.engine.front.handover.lease_desk import LeaseDesk
    from pdctl.engine.front.handover.peers import LeaseRef, Peers
    from pdctl.engine.front.handover.receiver import Receiver, _Run
    from pdctl.engine.handover.lease import Lease, Verdict
    from pdctl.engine.handover.puller import Puller
    from pdctl.engine.handover.reception import ReceptionEvent
    from pdctl.engine.ipc.messages import Pull
    from pdctl.net.http_client import Unreachable
    from pdctl.supervisor.service.kv import KvWatch
    from pdctl.wire import LeaseReply, Offer, RenewCall

_T = TypeVar("_T")

_DIR = os.environ.get("CHAOS_DIR", "")
_SABOTAGE = os.environ.get("CHAOS_SABOTAGE", "")


def _name() -> str:
    words: list[str] = getattr(sys, "orig_argv", [])
    return words[words.index("--name") + 1] if "--name" in words else ""


_NAME = _name()


def _fired(point: str) -> tuple[str, float] | None:
    """The action armed here, if any. Reading it disarms it."""
    file = Path(_DIR) / f"{_NAME}.{point}"
    try:
        action = file.read_text()
        file.rename(file.with_name(f"hit.{_NAME}.{point}.{os.getpid()}"))
    except FileNotFoundError:
        return None
    word, _, argument = action.partition(" ")
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)
    if word == "stop":
        # Another process must resume this one, even if the driver is busy.
        later = f"sleep {argument}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", later], stdin=subprocess.DEVNULL, close_fds=True, start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    return word, float(argument or 0)


async def _call_point(point: str, call: Callable[[], Awaitable[_T]], unreachable: type[Unreachable]) -> _T:
    """Wrap a call to a peer: delay it, lose the request, or lose the reply."""
    match _fired(f"before_{point}"):
        case ("delay", seconds):
            await asyncio.sleep(seconds)
        case ("drop", _):
            raise unreachable(f"chaos lost the {point}")
    result = await call()
    match _fired(f"after_{point}"):
        case ("delay", seconds):
            await asyncio.sleep(seconds)
        case ("drop", _):
            raise unreachable(f"chaos lost the answer of the {point}", sent=True)
    return result


def _patch_peers(module: ModuleType) -> None:
    lease_call, renew, offer = module.Peers.lease_call, module.Peers.renew, module.Peers.offer

    async def chaotic_call(self: Peers, lease: LeaseRef, verb: str) -> LeaseReply:
        return await _call_point(verb, lambda: lease_call(self, lease, verb), module.Unreachable)

    async def chaotic_renew(self: Peers, host: str, port: int, call: RenewCall) -> list[str]:
        return await _call_point("renew", lambda: renew(self, host, port, call), module.Unreachable)

    async def chaotic_offer(self: Peers, host: str, port: int, given: Offer) -> LeaseReply:
        return await _call_point("offer", lambda: offer(self, host, port, given), module.Unreachable)

    module.Peers.lease_call, module.Peers.renew, module.Peers.offer = chaotic_call, chaotic_renew, chaotic_offer


def _patch_puller(module: ModuleType) -> None:
    read: Callable[[Puller, Pull], int] = module.Puller._read
    pulled: Callable[[Puller, Pull], None] = module.Puller._pull

    def chaotic_read(self: Puller, pull: Pull) -> int:
        match _fired("before_read"):
            case ("delay", seconds):
                time.sleep(seconds)
            case ("drop", _):
                raise module.TransferError("chaos lost the read")
            case ("late", seconds):
                _land_later(module, lambda: read(self, pull), seconds)
        moved = read(self, pull)
        match _fired("after_read"):
            case ("delay", seconds):
                time.sleep(seconds)
            case ("drop", _):
                raise module.TransferError("chaos lost the read")
        return moved

    module.Puller._read = chaotic_read
    if _SABOTAGE == "quarantine":

        def forgetful(self: Puller, pull: Pull) -> None:
            report = self._report
            self._report = lambda message: report(
                module.Pulled(message.request_id, message.error, message.seconds, message.bytes, False)
                if isinstance(message, module.Pulled)
                else message
            )
            try:
                pulled(self, pull)
            finally:
                del self._report
                self._report = report

        module.Puller._pull = forgetful
        module.Puller._keep_house = lambda self: None


def _land_later(module: ModuleType, read: Callable[[], int], seconds: float) -> NoReturn:
    """Give up a read at once and let its bytes arrive later, as may happen in a network."""
    landed = threading.Event()

    def land() -> None:
        time.sleep(seconds)
        with contextlib.suppress(module.TransferError, ValueError):
            read()
        landed.set()

    threading.Thread(target=land, daemon=True).start()
    raise module.TransferUncertain("chaos gave the read up", landed.is_set)


def _patch_receiver(module: ModuleType) -> None:
    if _SABOTAGE == "commit":

        async def trusting(self: Receiver, run: _Run) -> tuple[ReceptionEvent, str]:
            """Decode without checking whether the KV read was still valid, then release, as other systems do."""
            self._peers.release_later(run.lease)
            self._trace.write("commit", run.lease.lease_id, holder=self._peers.holder, ok=True)
            return module.ReceptionEvent.COMMIT_OK, ""

        module.Receiver._commit = trusting


def _patch_leases(module: ModuleType) -> None:
    grant: Callable[..., Lease | None] = module.LeaseDesk.grant
    free: Callable[[LeaseDesk, Verdict], None] = module.LeaseDesk._end

    def chaotic_grant(self: LeaseDesk, *arguments: object, **options: object) -> Lease | None:
        lease = grant(self, *arguments, **options)
        _fired("after_grant")
        return lease

    def chaotic_end(self: LeaseDesk, verdict: Verdict) -> None:
        _fired("before_free")
        free(self, verdict)

    module.LeaseDesk.grant, module.LeaseDesk._end = chaotic_grant, chaotic_end


def _patch_kv(module: ModuleType) -> None:
    if _SABOTAGE == "witness":

        async def blind(self: KvWatch, name: str, holder: str) -> None:
            return None

        module.KvWatch.reclaim = blind


_PATCHES = {
    "pdctl.engine.front.handover.peers": _patch_peers,
    "pdctl.engine.front.handover.lease_desk": _patch_leases,
    "pdctl.engine.front.handover.receiver": _patch_receiver,
    "pdctl.engine.handover.puller": _patch_puller,
    "pdctl.supervisor.service.kv": _patch_kv,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds pdctl's modules and patches them after they are imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        patch = _PATCHES.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.loader is not None, name
        run = spec.loader.exec_module

        def run_and_patch(module: ModuleType) -> None:
            run(module)
            patch(module)

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]  # patching is what this file does
        return spec


if _DIR:
    sys.meta_path.insert(0, _Finder())
