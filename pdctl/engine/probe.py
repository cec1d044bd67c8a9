"""`python -m pdctl.engine probe`: time one transport between two temporary processes.

Prints one JSON object as the last line of stdout. Transfers are compared with memory copies of the same bytes, measured
in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np

from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import Memory, NoMemory
from pdctl.engine.transfer import Settings, TransferError, Transport, transport_kind
from pdctl.host import program
from pdctl.net import LOOPBACK
from pdctl.transports import TRANSPORTS

_BLOCK = 64 * 1024
_READ_S = 30.0
_ROUNDS = 7
_SEED = 7


def main(argv: list[str]) -> int:
    """Run a probe. Returns 0 with measurements, or 1 with `error`."""
    parser = argparse.ArgumentParser(prog="python -m pdctl.engine probe")
    parser.add_argument("--transport", choices=sorted(TRANSPORTS), required=True)
    parser.add_argument("--protocol", choices=["auto", "tcp", "rdma"], default="auto")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--pieces", type=_counts, default=(), help="also read all bytes split into N scattered pieces")
    parser.add_argument(
        "--serve", action="store_true", help="act as the peer: print an address and serve until stdin closes"
    )
    parser.add_argument(
        "--from-stdin", action="store_true", help="read from a peer on another host: its address is on stdin"
    )
    parser.add_argument("--host", default=LOOPBACK, help="this machine's address for peers")
    parser.add_argument("--cpus", type=_numbers, default=set(), help="CPUs of the reader; default: any")
    parser.add_argument("--peer-cpus", type=_numbers, default=set(), help="CPUs of the serving process")
    parser.add_argument("--devices", type=_names, default=(), help="RDMA devices")
    parser.add_argument(
        "--peer-devices", type=_names, default=(), help="RDMA devices of the serving process; default: as --devices"
    )
    options = parser.parse_args(argv)
    if options.cpus:
        os.sched_setaffinity(0, options.cpus)
    num_bytes = options.mib * 2**20
    place = Place(options.transport, options.protocol, num_bytes, options.devices, options.host)
    if options.serve:
        return _serve(place)
    try:
        peer = replace(place, devices=options.peer_devices or place.devices)
        opened = _told_peer() if options.from_stdin else scratch_peer(peer, options.peer_cpus)
        found = probe(place, opened, options.pieces, is_far=options.from_stdin)
    except (TransferError, NoMemory) as failure:
        found = {"transport": options.transport, "error": str(failure)}
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if "error" in found else 0


@dataclass(frozen=True)
class Place:
    """The settings of one transport at one end."""

    transport: str
    protocol: str
    num_bytes: int
    devices: tuple[str, ...] = ()
    host: str = LOOPBACK

    def open(self, memory: Memory, epoch: str, serving: bool = True) -> Transport:
        """Open the transport. Raises TransferError if it cannot be used."""
        settings = Settings(epoch, self.host, protocol=self.protocol, devices=self.devices, serving=serving)
        return transport_kind(self.transport).open_transport(memory, settings)

    def words(self) -> list[str]:
        """The settings as command-line arguments."""
        words = ["--transport", self.transport, "--protocol", self.protocol, "--mib", str(self.num_bytes // 2**20)]
        return [*words, *(["--devices", ",".join(self.devices)] if self.devices else [])]


def _numbers(text: str) -> set[int]:
    return {int(word) for word in text.split(",")}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def probe(
    place: Place, opened: AbstractContextManager[str], pieces: Sequence[int] = (), is_far: bool = False
) -> dict[str, object]:
    """Measure one transport from a peer to here. `opened`: the peer's address while it serves; `is_far`: it is on
    another host. Raises TransferError if it cannot be used, NoMemory."""
    name, num_bytes = place.transport, place.num_bytes
    epoch = f"probe-{os.getpid()}"
    memory = Memory(num_bytes, epoch)
    transport = place.open(memory, epoch, serving=False)
    with opened as address:
        content = np.random.default_rng(_SEED).integers(0, 256, num_bytes, dtype=np.uint8)

        def read(spans: list[Span]) -> Callable[[], object]:
            return lambda: transport.read(address, num_bytes, spans, _READ_S)

        read([Span(0, 0, num_bytes)])()
        right = bool((memory.bytes == content).all())
        one, copy_one = _against(read([Span(0, 0, num_bytes)]), _copy(content, memory, [Span(0, 0, num_bytes)]))
        blocks = scattered(num_bytes)
        many, copy_many = _against(read(blocks), _copy(content, memory, blocks))
        cut = []
        for count in pieces:
            spans = in_pieces(num_bytes, count)
            memory.bytes[:] = 0
            read(spans)()
            right &= all((memory.bytes[t : t + n] == content[s : s + n]).all() for s, t, n in spans)
            cut.append(_measurements(spans, *_against(read(spans), _copy(content, memory, spans))))
        small = statistics.median(_timed(read([Span(64, 0, 64)])) for _ in range(50))
    _close(transport, memory)
    return {
        "transport": name,
        # Shared memory, which a library would also use, is of one host.
        "protocol": transport.protocol.removeprefix("sm+") if is_far else transport.protocol,
        "fallback": transport.fallback,
        "bytes_right": right,
        "mib": num_bytes // 2**20,
        "gbps": round(num_bytes / one / 1e9, 3),
        "of_copy": round(copy_one / one, 3),
        "blocks": len(blocks),
        "blocks_gbps": round(len(blocks) * _BLOCK / many / 1e9, 3),
        "blocks_of_copy": round(copy_many / many, 3),
        "copy_gbps": round(num_bytes / copy_one / 1e9, 3),
        "latency_us": round(small * 1e6, 1),
        "pieces": cut,
    }


def _measurements(spans: Sequence[Span], seconds: float, copy: float) -> dict[str, float]:
    num_bytes = sum(length for _, _, length in spans)
    return {
        "count": len(spans),
        "bytes_each": spans[0][2],
        "ms": round(seconds * 1e3, 3),
        "gbps": round(num_bytes / seconds / 1e9, 3),
        "copy_gbps": round(num_bytes / copy / 1e9, 3),
        "of_copy": round(copy / seconds, 3),
    }


def in_pieces(num_bytes: int, count: int) -> list[Span]:
    """`count` pieces of equal size in random order, so that almost none can be merged with its neighbour."""
    size = num_bytes // count
    order = np.random.default_rng(1).permutation(count)
    return [Span(int(source) * size, target * size, size) for target, source in enumerate(order)]


def scattered(num_bytes: int) -> list[Span]:
    """Up to 1,000 blocks in an order in which none can be merged."""
    count = min(1000, num_bytes // _BLOCK)
    order = np.random.default_rng(1).permutation(num_bytes // _BLOCK)[:count]
    return [Span(int(source) * _BLOCK, target * _BLOCK, _BLOCK) for target, source in enumerate(order)]


def _copy(content: np.ndarray, memory: Memory, spans: list[Span]) -> Callable[[], object]:
    def copy() -> None:
        for source, target, length in spans:
            memory.bytes[target : target + length] = content[source : source + length]

    return copy


def _against(transfer: Callable[[], object], copy: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of both, measured in turn."""
    transfers, copies = [], []
    for _ in range(_ROUNDS):
        transfers.append(_timed(transfer))
        copies.append(_timed(copy))
    return statistics.median(transfers), statistics.median(copies)


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


@contextmanager
def _told_peer() -> Iterator[str]:
    """The address of a peer that somebody else has started."""
    yield sys.stdin.readline().strip()


@contextmanager
def scratch_peer(place: Place, cpus: set[int]) -> Iterator[str]:
    """The address of a temporary process that serves known bytes, on these CPUs if given."""
    words = [*place.words(), "--serve", *(["--cpus", ",".join(map(str, cpus))] if cpus else [])]
    argv = program.this_engine("probe", *words)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ADDRESS "):
                    yield line.split()[1]
                    break
            else:
                raise TransferError("the scratch peer could not start; its reason is above")
        finally:
            process.kill()


def _serve(place: Place) -> int:
    epoch = f"probe-{os.getpid()}"
    memory = Memory(place.num_bytes, epoch)
    memory.bytes[:] = np.random.default_rng(_SEED).integers(0, 256, place.num_bytes, dtype=np.uint8)
    try:
        transport = place.open(memory, epoch)
    except TransferError as failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    sys.stdout.write(f"ADDRESS {transport.address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    _close(transport, memory)
    return 0


def _close(transport: Transport, memory: Memory) -> None:
    transport.close()
    memory.close()
