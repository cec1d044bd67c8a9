"""The transport cuda_ipc between two processes on one GPU, as a part of a copy within the GPU.

    python -m benchmarks.gpu.transfer [--mib 1024] [--device cuda]

Prints one JSON line. `--device cpu`: the same over shared memory, for a trial.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.gpu.limits import copy_bytes_per_second
from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import DeviceMemory, Memory
from pdctl.engine.transfer import Settings, TransferError, transport_kind

_ROUNDS = 8
# Bytes of one layer's keys in a block of 16 tokens of an 8B model.
_BLOCK = 16 * 8 * 128 * 2
# Keys and values of 32 layers.
_PLANES = 64
_EPOCHS = ("a1", "0f")


def main() -> int:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.transfer")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    if options.serve:
        return _serve(options.mib << 20, options.device)
    found: dict[str, Any] = {"transfer": _name(options.device), "mib": options.mib}
    try:
        found |= _measure(options.mib << 20, options.device)
    except (TransferError, RuntimeError, OSError) as failure:
        found["error"] = f"{type(failure).__name__}: {failure}"
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if "error" in found else 0


def _name(device: str) -> str:
    return "cuda_ipc" if device == "cuda" else "shm"


def _pool(num_bytes: int, device: str, epoch: str) -> tuple[torch.Tensor, Memory | DeviceMemory]:
    if device == "cpu":
        memory = Memory(num_bytes, epoch)
        return torch.frombuffer(memory.view, dtype=torch.uint8), memory
    store = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return store, DeviceMemory(store.data_ptr(), num_bytes, store.device.index or 0)


def _content(num_bytes: int, device: str) -> torch.Tensor:
    """Every place has another content than its neighbours."""
    places = torch.arange(num_bytes // 8, device=device, dtype=torch.int64)
    return (places * 2654435761 + 12345).view(torch.uint8)


def _serve(num_bytes: int, device: str) -> int:
    store, memory = _pool(num_bytes, device, _EPOCHS[0])
    store.copy_(_content(num_bytes, device))
    if device == "cuda":
        torch.cuda.synchronize()
    transport = transport_kind(_name(device)).open_transport(memory, Settings(_EPOCHS[0]))
    sys.stdout.write(f"ADDRESS {transport.address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    return 0


def _places(plane: int, order: list[int]) -> list[int]:
    """Where the blocks of one plane are."""
    return [(plane * len(order) + block) * _BLOCK for block in order]


def _measure(num_bytes: int, device: str) -> dict[str, Any]:
    store, memory = _pool(num_bytes, device, _EPOCHS[1])
    words = ["--serve", "--mib", str(num_bytes >> 20), "--device", device]
    argv = [sys.executable, "-m", "benchmarks.gpu.transfer", *words]
    peer = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert peer.stdout is not None
        line = next((line for line in peer.stdout if line.startswith("ADDRESS ")), "")
        if not line:
            raise RuntimeError("the peer ended without an address")
        address = line.split()[1]
        transport = transport_kind(_name(device)).open_transport(memory, Settings(_EPOCHS[1], serving=False))
        transport.connect(address, num_bytes)
        # Within the device, read and written bytes are added; a transfer reads and writes, too.
        copy = copy_bytes_per_second(torch.device(device)) / 2
        expected, found = _content(num_bytes, device), {}
        order = torch.randperm(num_bytes // _PLANES // _BLOCK, generator=torch.Generator().manual_seed(1)).tolist()
        spans = {
            "whole": [Span(0, 0, num_bytes)],
            # Runs of 64 blocks, and single blocks in all planes, as in a pool in pieces.
            "runs": [Span(at, at, 64 * _BLOCK) for at in range(0, num_bytes, 64 * _BLOCK)],
            "blocks": [Span(at, at, _BLOCK) for plane in range(_PLANES) for at in _places(plane, order)],
        }
        for kind, todo in spans.items():
            store.zero_()
            if device == "cuda":
                torch.cuda.synchronize()
            times = []
            for _ in range(_ROUNDS):
                started = time.perf_counter()
                transport.read(address, num_bytes, todo, 60.0)
                times.append(time.perf_counter() - started)
            rate = num_bytes / statistics.median(times[1:])
            right = bool(torch.equal(store, expected))
            found[kind] = {"gb_per_s": round(rate / 1e9, 1), "of_copy": round(rate / copy, 3), "right": right}
            if not right:
                raise RuntimeError(f"{kind}: wrong bytes arrived")
        transport.close()
        return found
    finally:
        peer.kill()
        peer.wait()


if __name__ == "__main__":
    raise SystemExit(main())
