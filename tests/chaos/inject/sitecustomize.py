"""Loaded by every Python process of a chaos run (PYTHONPATH): failpoints in the hand-over, and safeguards switched off.

A failpoint fires when the driver has left a file `ENGINE.POINT` in CHAOS_DIR; its text is the action. CHAOS_SABOTAGE
names one safeguard to switch off, to show that the suite notices. None of this is in the product.
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
from pathlib import Path

_DIR = os.environ.get("CHAOS_DIR", "")
_SABOTAGE = os.environ.get("CHAOS_SABOTAGE", "")


def _name():
    words = getattr(sys, "orig_argv", [])
    return words[words.index("--name") + 1] if "--name" in words else ""


_NAME = _name()


def _fired(point):
    """The action armed here, if any; taking it disarms it."""
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
        # Somebody else must wake us, even if the driver is busy.
        later = f"sleep {argument}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", later], stdin=subprocess.DEVNULL, close_fds=True, start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    return word, float(argument or 0)


async def _call_point(point, call, unreachable):
    """Around a call to a peer: delayed, lost on the way there, or lost on the way back."""
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


def _patch_peers(module):
    lease_call, renew, offer = module.Peers.lease_call, module.Peers.renew, module.Peers.offer

    async def chaotic_call(self, lease, verb):
        return await _call_point(verb, lambda: lease_call(self, lease, verb), module.Unreachable)

    async def chaotic_renew(self, host, port, call):
        return await _call_point("renew", lambda: renew(self, host, port, call), module.Unreachable)

    async def chaotic_offer(self, host, port, given):
        return await _call_point("offer", lambda: offer(self, host, port, given), module.Unreachable)

    module.Peers.lease_call, module.Peers.renew, module.Peers.offer = chaotic_call, chaotic_renew, chaotic_offer


def _patch_puller(module):
    read, pulled = module.Puller._read, module.Puller._pull

    def chaotic_read(self, pull):
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

        def forgetful(self, pull):
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


def _land_later(module, read, seconds):
    """Give a read up at once and let its bytes land afterwards, as a network may."""
    landed = threading.Event()

    def land():
        time.sleep(seconds)
        with contextlib.suppress(module.TransferError, ValueError):
            read()
        landed.set()

    threading.Thread(target=land, daemon=True).start()
    raise module.TransferUncertain("chaos gave the read up", landed.is_set)


def _patch_migrate(module):
    if _SABOTAGE == "commit":

        async def trusting(self, run):
            """Decode what was read without asking whether it was still there; then let go, as other systems do."""
            self._peers.release_later(run.lease)
            self._trace.write("commit", run.lease.lease_id, holder=self._peers.holder, ok=True)
            return module.MigrationEvent.COMMIT_OK, ""

        module.Migrator._commit = trusting


def _patch_leases(module):
    grant, free = module.LeaseDesk.grant, module.LeaseDesk._end

    def chaotic_grant(self, *arguments, **options):
        lease = grant(self, *arguments, **options)
        _fired("after_grant")
        return lease

    def chaotic_end(self, verdict):
        _fired("before_free")
        return free(self, verdict)

    module.LeaseDesk.grant, module.LeaseDesk._end = chaotic_grant, chaotic_end


def _patch_kv(module):
    if _SABOTAGE == "witness":

        async def blind(self, name, holder):
            return None

        module.KvWatch.reclaim = blind


_PATCHES = {
    "pdctl.engine.front.handover.peers": _patch_peers,
    "pdctl.engine.front.handover.leases": _patch_leases,
    "pdctl.engine.front.handover.migrate": _patch_migrate,
    "pdctl.engine.handover.puller": _patch_puller,
    "pdctl.supervisor.service.kv": _patch_kv,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds our modules where they are, and patches them after they have run."""

    def find_spec(self, name, path, target=None):
        patch = _PATCHES.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_patch(module):
            run(module)
            patch(module)

        spec.loader.exec_module = run_and_patch
        return spec


if _DIR:
    sys.meta_path.insert(0, _Finder())
