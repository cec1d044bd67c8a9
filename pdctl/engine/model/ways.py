"""Which way computes a matrix product fastest on this CPU: measured once, then kept in the user's cache.

All engines of a host must choose alike, or a sequence that moves between two of them gets other roundings. So the first
engine measures, holding a lock, and the others read what it found. Without a usable cache the table is not measured,
but fixed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
import torch

from pdctl.engine.model.products import PLAIN_WAYS, ROW_STEPS, PlainName, Way, pack, packer, packs, padded
from pdctl.host.cached_file import locked, replace
from pdctl.host.processor import cpu_name

# A new number discards what was measured by an older version.
_FORMAT = 2
_MOST_SECONDS = 2.0
_LOCK_SECONDS = 30.0
_REPEATS = 3
# Measured on a piece of a weight: its time grows in proportion to its outputs.
_MOST_ELEMENTS = 4 << 20
# The packed form is preferred until a plain way is this many times as fast: it gives the same bits for any number of
# rows, and in bfloat16, where other bits can be another token, always. Noise should not decide which of two equally
# fast ways a host uses.
_PREFERENCE = 1.25

# A vocabulary projection; used by the fixed rules.
_TALL = 32768

Size = tuple[int, int]


class Ways(msgspec.Struct, frozen=True):
    """The choice for one shape. `packed`: pack the weight, for all numbers of rows. `plain`: otherwise, the way for up
    to each number of rows in ROW_STEPS. `measured`: whether there was time to measure it."""

    packed: bool = True
    plain: tuple[PlainName, ...] = ("transposed", "transposed", "linear", "linear")
    measured: bool = False

    def __post_init__(self) -> None:
        if len(self.plain) != len(ROW_STEPS):
            raise ValueError(f"{len(self.plain)} ways for {len(ROW_STEPS)} numbers of rows")


class _Table(msgspec.Struct, frozen=True):
    """The file. `key`: what the measurements depend on, for people; `shapes`: by "OUTxIN"."""

    key: tuple[str, ...]
    shapes: dict[str, Ways]
    format: Literal[1] = 1


def choose(sizes: Iterable[Size], dtype: torch.dtype, folder: Path | None) -> dict[Size, Ways]:
    """The ways for weights of these sizes [out, in]; measures those that the table in `folder` lacks, in about two
    seconds at most. None: no table."""
    wanted = sorted(set(sizes))
    fixed = {size: _fixed(size, dtype) for size in wanted}
    if folder is None or not wanted:
        return fixed
    key = _key(dtype)
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
    known = _read(path, key)
    if not all(_named(size) in known for size in wanted):
        try:
            with locked(path.with_suffix(".lock"), _LOCK_SECONDS):
                known = _read(path, key)
                known |= _measure([size for size in wanted if _named(size) not in known], dtype)
                _write(path, _Table(key, known))
        except OSError:
            # Every engine that cannot use the table uses the same rules instead.
            return fixed
    return {size: _possible(known[_named(size)], dtype) for size in wanted}


def _possible(found: Ways, dtype: torch.dtype) -> Ways:
    return found if packs(dtype) or not found.packed else msgspec.structs.replace(found, packed=False)


def _fixed(size: Size, dtype: torch.dtype) -> Ways:
    """Rules for fp32 that were measured with one thread on an AVX2 machine (docs/performance.md)."""
    if dtype is not torch.float32 or size[0] < size[1]:
        return Ways(packs(dtype), ("linear", "linear", "linear", "linear"))
    if size[0] < _TALL:
        return Ways(packs(dtype), ("transposed", "transposed", "linear", "linear"))
    return Ways(packs(dtype), ("transposed", "transposed", "pieces", "pieces"))


def _named(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _key(dtype: torch.dtype) -> tuple[str, ...]:
    return (
        cpu_name(), torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}",
        f"{torch.get_num_threads()} threads", str(dtype), f"packs {packs(dtype) and packer(dtype)}",
        f"format {_FORMAT}",
    )  # fmt: skip


def _read(path: Path, key: tuple[str, ...]) -> dict[str, Ways]:
    """Empty if there is no table, or a broken one."""
    try:
        table = msgspec.json.decode(path.read_bytes(), type=_Table)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return dict(table.shapes) if table.key == key else {}


def _write(path: Path, table: _Table) -> None:
    replace(path, msgspec.json.format(msgspec.json.encode(table), indent=1))


def _measure(sizes: list[Size], dtype: torch.dtype) -> dict[str, Ways]:
    """Small shapes first: they cost least, and what is left when the time is over gets the fixed rules."""
    end = _now() + _MOST_SECONDS
    found = {}
    for size in sorted(sizes, key=lambda size: size[0] * size[1]):
        found[_named(size)] = _measured(size, dtype) if _now() < end else _fixed(size, dtype)
    return found


@torch.inference_mode()
def _measured(size: Size, dtype: torch.dtype) -> Ways:
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = min(size[0], max(1, _MOST_ELEMENTS // size[1])), size[1]
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    packed_weight = pack(weight) if packs(dtype) else None
    plain: list[PlainName] = []
    ratio = 1.0
    for rows in ROW_STEPS:
        given = torch.randn(rows, inputs, generator=generator).to(dtype)
        times = {name: _seconds(way, given, weight) for name, way in PLAIN_WAYS.items()}
        best = min(times, key=lambda name: times[name] * (1 if name == "linear" else _PREFERENCE))
        plain.append(best)
        if packed_weight is not None:
            ratio *= _seconds(lambda rows, _: padded(rows, packed_weight), given, weight) / times[best]
    wins = dtype is not torch.float32 or ratio ** (1 / len(ROW_STEPS)) < _PREFERENCE
    packed = packed_weight is not None and wins
    return Ways(packed, tuple(plain), measured=True)


def _seconds(way: Way, given: torch.Tensor, weight: torch.Tensor) -> float:
    took = []
    for _ in range(_REPEATS + 1):
        started = _now()
        way(given, weight)
        took.append(_now() - started)
    # The first one also allocates, and oneDNN generates its code.
    return max(min(took[1:]), 1e-9)


def _now() -> float:
    """CPU seconds if this thread computes alone: other processes share the machine. Else seconds."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
