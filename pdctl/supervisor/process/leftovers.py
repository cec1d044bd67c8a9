"""Ends the processes that an earlier supervisor left behind and that are not taken over, before new ones start."""

from __future__ import annotations

from pdctl.errors import PdctlError
from pdctl.host.processes.stamps import stamps
from pdctl.supervisor.process.shared_memory import mapped, remove_unused
from pdctl.supervisor.process.tree import SweptTree, kill_tree
from pdctl.supervisor.rundir.adoption import AdoptableState
from pdctl.supervisor.rundir.journal import Journal

_CLEAR_S = 10.0


async def clear_leftovers(stamp: str, adoptable: AdoptableState | None, journal: Journal) -> None:
    """End every process with the service's stamp that is not taken over. Raises PdctlError if one does not end.

    If the service is taken over, these are processes that the earlier supervisor had started but not yet recorded.
    """
    known = {f"{stamp}:{record.spec.name}" for record in adoptable.processes} if adoptable else set()
    for stray in [found for found in stamps(f"{stamp}:") if found not in known]:
        tree = SweptTree(stray)
        pids = tree.pids()
        journal.say("pdctl", f"killing the processes {pids} of an earlier start")
        shared_memory = mapped(pids)
        if left := await kill_tree(tree, set(), _CLEAR_S):
            hint = "they are stuck in the kernel (state D); wait, or reboot"
            raise PdctlError(f"the processes {left} of an earlier start do not end", hint)
        remove_unused(shared_memory)
