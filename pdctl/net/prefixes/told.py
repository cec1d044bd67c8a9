"""What another process has told of what it has: names, and how they change. Pure."""

from __future__ import annotations

from pdctl.wire import BlocksCall, BlocksReply


class Told:
    """`names`: what it has, by its answers so far. Without any, everything is asked for."""

    def __init__(self) -> None:
        self.names: set[int] = set()
        self._epoch, self._sequence = "", 0

    def call(self, wait_s: float) -> BlocksCall:
        """What to ask next."""
        return BlocksCall(self._epoch, self._sequence, wait_s)

    def heard(self, reply: BlocksReply) -> bool:
        """The answer to `call`. One that does not follow what is known makes everything unknown; returns False then."""
        if reply.whole:
            self.names = set(reply.stored)
        elif reply.epoch == self._epoch and reply.sequence >= self._sequence:
            self.names.update(reply.stored)
            self.names.difference_update(reply.removed)
        else:
            self.forget()
            return False
        self._epoch, self._sequence = reply.epoch, reply.sequence
        return True

    def forget(self) -> None:
        """Nothing is known any more."""
        self.names = set()
        self._epoch, self._sequence = "", 0
