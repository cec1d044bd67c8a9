"""KV that another engine has asked for: blocks that are here already, held until it has read them."""

from __future__ import annotations

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.room import Room
from pdctl.engine.schedule.sequence import Sequence, Status


def held(request_id: str, token_ids: list[int], salt: str, room: Room) -> Sequence | None:
    """A sequence with the blocks of a prompt's first tokens, as many as are here. None if there are none, or too many
    blocks are for peers already."""
    found = Sequence(request_id, token_ids, 0, Sampling(1), hold=True, salt=salt, status=Status.HELD)
    if not room.allows_lease(found):
        return None
    found.num_computed = room.attach(found, len(token_ids))
    if not found.block_ids:
        room.release(found)
        return None
    return found
