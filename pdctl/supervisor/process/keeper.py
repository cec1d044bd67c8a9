"""Keeps duplicates of clients' connections, so that the end of a proxy does not end them, and the journal of what the
proxy does with them. It reads neither."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterable
from functools import partial

import msgspec

from pdctl.net.keeping import (
    CRASHED,
    DROP,
    END,
    KEEP,
    KEPT,
    MOST_TOGETHER,
    REPORT,
    UNCOVERED,
    Packet,
    TakenOver,
    channel,
    cookie_of,
    receive,
    send,
)
from pdctl.supervisor.process.succession import KeptConnections

# Connections that no proxy has claimed for this long are ended, seconds.
_UNCLAIMED_S = 60.0
# How long the process that shares a dead proxy's descriptors may take to tell of them, seconds.
_LAST_WORDS_S = 2.0
# Packets read before anything else is done.
_MOST_AT_ONCE = 256

_decode_report = msgspec.json.Decoder(TakenOver).decode


class Keeper:
    """Keeps the connections of one proxy. `told` is called with what a proxy did with its predecessor's.

    `takeovers`: starts that had connections to go on with; `total`: the sums of all reports; `uncovered`: connections
    that had no slot, so far; `refused`: packets that were not as they must be.
    """

    def __init__(self, name: str, slots: int, told: Callable[[TakenOver], None]) -> None:
        self.name = name
        self.slots = slots
        self.takeovers = 0
        self.refused = 0
        self.uncovered = 0
        self.total = TakenOver()
        self._told = told
        self._kept: dict[int, int] = {}
        self._memory = os.memfd_create(f"pdctl-{name}", os.MFD_CLOEXEC)
        self._channel: socket.socket | None = None
        self._unclaimed: asyncio.TimerHandle | None = None
        self._silent = asyncio.Event()
        self._had = 0
        self._crashed = False

    @property
    def held(self) -> int:
        """Connections that it has."""
        return len(self._kept)

    def kept(self) -> KeptConnections:
        """Everything, for a succession."""
        return KeptConnections(
            name=self.name,
            slots=self.slots,
            memory=self._memory,
            channel=-1 if self._channel is None else self._channel.fileno(),
            connections=dict(self._kept),
            had=self._had,
            crashed=self._crashed,
            takeovers=self.takeovers,
            uncovered=self.uncovered,
            refused=self.refused,
            total=self.total,
        )

    @classmethod
    def restored(cls, kept: KeptConnections, told: Callable[[TakenOver], None]) -> Keeper:
        """The keeper of the supervisor that this process was before."""
        found = cls(kept.name, kept.slots, told)
        os.close(found._memory)
        found._memory, found._kept, found._had = kept.memory, dict(kept.connections), kept.had
        found.takeovers, found.uncovered, found.refused = kept.takeovers, kept.uncovered, kept.refused
        found._crashed, found.total = kept.crashed, kept.total
        if kept.channel >= 0:
            found._channel = socket.socket(fileno=kept.channel)
            asyncio.get_running_loop().add_reader(kept.channel, found._read)
        elif found._kept:
            found._unclaimed = asyncio.get_running_loop().call_later(_UNCLAIMED_S, found.drop_all)
        return found

    def hand_over(self) -> tuple[socket.socket, int]:
        """The channel for the next proxy, which has all connections in it, and the journal. The caller closes the
        channel after the start."""
        if self._channel is not None:
            # It ended while nobody looked: this process has become another version's in that moment.
            self.ended(self._crashed)
        ours, theirs = channel()
        if not self._kept:
            # Without connections nothing of an earlier journal matters.
            os.ftruncate(self._memory, 0)
        self._had = len(self._kept)
        cookies = list(self._kept)
        for begin in range(0, len(cookies), MOST_TOGETHER):
            part = cookies[begin : begin + MOST_TOGETHER]
            try:
                send(ours, KEPT, b"", [self._kept[cookie] for cookie in part])
            except OSError:
                # More than a socket holds: these end.
                for cookie in part:
                    self._drop(cookie)
        with contextlib.suppress(OSError):
            send(ours, END, CRASHED if self._crashed else b"")
        self._channel = ours
        self._silent.clear()
        asyncio.get_running_loop().add_reader(ours.fileno(), self._read)
        return theirs, self._memory

    async def told_all(self) -> None:
        """The proxy has ended: wait until the process that shares its descriptors has told of them, and so has ended
        too. It may be killed after that."""
        if self._channel is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._silent.wait(), _LAST_WORDS_S)

    def ended(self, crashed: bool = False) -> None:
        """The proxy has ended: read what it said last. Its connections wait for the next one. `crashed`: it ended of
        itself, so that a request may be the cause."""
        self._crashed = crashed
        if self._channel is None:
            return
        while self._read() and self._channel is not None:
            pass
        self._leave()
        if self._kept and self._unclaimed is None:
            self._unclaimed = asyncio.get_running_loop().call_later(_UNCLAIMED_S, self.drop_all)

    def drop_all(self) -> None:
        """End all connections: no proxy will go on with them."""
        self._claimed()
        for cookie in list(self._kept):
            self._drop(cookie)

    def close(self) -> None:
        """End everything."""
        self.drop_all()
        self._leave()
        os.close(self._memory)

    def _leave(self) -> None:
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None

    def _read(self) -> bool:
        """Returns False if there was nothing more to read."""
        assert self._channel is not None
        for _ in range(_MOST_AT_ONCE):
            try:
                packet = receive(self._channel)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                # It died before it had read everything. What it said is still there.
                continue
            except OSError:
                packet = None
            if packet is None:
                self._leave_later()
                return False
            self._take(packet)
        return True

    def _leave_later(self) -> None:
        """The other end is closed: the proxy has ended, and who shares its descriptors."""
        assert self._channel is not None
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        self._silent.set()

    def _take(self, packet: Packet) -> None:
        # Whatever it says, a proxy is there that has the connections.
        self._claimed()
        cookie = int.from_bytes(packet.body[:8], "little")
        if packet.kind == KEEP and len(packet.descriptors) == 1 and self._keep(cookie, packet.descriptors[0]):
            return
        for descriptor in packet.descriptors:
            os.close(descriptor)
        if packet.kind == DROP:
            self._drop(cookie)
        elif packet.kind == UNCOVERED:
            self.uncovered += 1
        elif packet.kind == REPORT:
            self._note(packet.body)
        else:
            self.refused += 1

    def _keep(self, cookie: int, descriptor: int) -> bool:
        """Returns False for a descriptor that is not this connection."""
        try:
            known = cookie_of(descriptor) == cookie
        except OSError:
            known = False
        if not known:
            return False
        if cookie in self._kept or len(self._kept) >= self.slots:
            # At its end a proxy's newest connections are told once more, and those without a slot for the first time.
            os.close(descriptor)
        else:
            self._kept[cookie] = descriptor
        return True

    def _drop(self, cookie: int) -> None:
        descriptor = self._kept.pop(cookie, None)
        if descriptor is None:
            return
        with socket.socket(fileno=descriptor) as connection, contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def _claimed(self) -> None:
        if self._unclaimed is not None:
            self._unclaimed.cancel()
            self._unclaimed = None

    def _note(self, body: bytes) -> None:
        try:
            told = _decode_report(body)
        except msgspec.DecodeError:
            self.refused += 1
            return
        if self._had:
            self.takeovers += 1
            total = self.total
            self.total = TakenOver(
                total.connections + told.connections,
                total.resumed + told.resumed,
                total.repeated + told.repeated,
                total.cut + told.cut,
                total.resent + told.resent,
                told.seconds,
                told.reasons,
            )
            self._told(told)


class Keepers:
    """The keepers of a service, by the names of their proxies. They outlive changes of the plan."""

    def __init__(self, told: Callable[[str, TakenOver], None]) -> None:
        self._told = told
        self._keepers: dict[str, Keeper] = {}

    def of(self, name: str, slots: int) -> Keeper | None:
        """The keeper of a proxy; None without slots. A change of `slots` counts from the moment at which it keeps
        nothing."""
        keeper = self._keepers.get(name)
        if not slots:
            if keeper is not None:
                keeper.drop_all()
            return None
        if keeper is None:
            keeper = self._keepers[name] = Keeper(name, slots, lambda told: self._told(name, told))
        elif not keeper.held:
            keeper.slots = slots
        return keeper

    def kept(self) -> list[KeptConnections]:
        """All of them, for a succession."""
        return [keeper.kept() for keeper in self._keepers.values()]

    def restore(self, kept: Iterable[KeptConnections]) -> None:
        """Go on as the supervisor that this process was before."""
        for one in kept:
            self._keepers[one.name] = Keeper.restored(one, partial(self._told, one.name))

    def get(self, name: str) -> Keeper | None:
        """The keeper of that name."""
        return self._keepers.get(name)

    def close(self) -> None:
        """End all connections."""
        for keeper in self._keepers.values():
            keeper.close()
        self._keepers.clear()
