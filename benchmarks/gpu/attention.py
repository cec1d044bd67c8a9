"""Every attention backend: parity with `gather` for each kind of layer, and the speed of its kernels.

    python -m benchmarks.gpu.attention [--device cuda] [--tiny]

Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.limits import copy_bytes_per_second, matrix_flops_per_second, seconds
from pdctl.engine.model.attention import BACKENDS, Backend, open_backend
from pdctl.engine.model.attention.batch import Batch, Call, LayerNeed, PoolNeed
from pdctl.engine.model.attention.choice import check

_PLAIN = LayerNeed(32, 8, 128, 128)
LAYERS = {
    "plain": _PLAIN,
    "heads of 64": LayerNeed(32, 8, 64, 64),
    "heads of 256": LayerNeed(8, 4, 256, 256),
    "heads of 80": LayerNeed(12, 4, 80, 80),
    "one KV head": LayerNeed(16, 1, 128, 128),
    "window": _PLAIN._replace(window=100),
    "soft-capping": _PLAIN._replace(softcap=30.0),
    "sinks": _PLAIN._replace(has_sinks=True, window=128),
}
_BLOCKS = (16, 256)


def main() -> int:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.attention")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="short contexts, for a trial on a CPU")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtypes = [torch.float32] if device.type == "cpu" else [torch.bfloat16, torch.float16, torch.float32]
    found = {"attention": [_backend(name, device, dtypes, options.tiny) for name in BACKENDS]}
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if any(entry["differs"] for entry in found["attention"]) else 0


def _backend(name: str, device: torch.device, dtypes: list[torch.dtype], tiny: bool) -> dict[str, Any]:
    """`agrees`: number of combinations; `refuses` and `differs`: reasons by combination. Speed with 16-bit numbers."""
    found: dict[str, Any] = {"backend": name, "agrees": 0, "refuses": {}, "differs": {}, "speed": {}}
    try:
        backend = open_backend(name, device)
    except (ImportError, RuntimeError) as failure:
        return found | {"missing": str(failure)}
    for dtype in dtypes:
        for size in _BLOCKS:
            for kind, layer in LAYERS.items():
                pool, key = PoolNeed(dtype, size), f"{kind}, {str(dtype).removeprefix('torch.')}, blocks of {size}"
                if reason := backend.refuses(layer, pool):
                    found["refuses"][key] = reason
                    continue
                try:
                    check(backend, layer, pool, device)
                    found["agrees"] += 1
                except Exception as failure:  # noqa: BLE001 - a kernel may fail in any way; the next ones are tried
                    found["differs"][key] = f"{type(failure).__name__}: {failure}"[:200]
    size = 256 if name == "varlen" else 16
    if not backend.refuses(_PLAIN, PoolNeed(dtypes[0], size)):
        try:
            found["speed"] = _speed(backend, device, dtypes[0], size, tiny)
        except Exception as failure:  # noqa: BLE001 - as above
            found["speed"] = {"error": f"{type(failure).__name__}: {failure}"[:200]}
    return found


def _speed(backend: Backend, device: torch.device, dtype: torch.dtype, size: int, tiny: bool) -> dict[str, Any]:
    """Decoding as a part of a copy's bandwidth, a prompt as a part of the matrix rate. One layer of an 8B model."""
    copy, flops = copy_bytes_per_second(device), matrix_flops_per_second(device, dtype)
    found: dict[str, Any] = {}
    for count, context in ((2, 64),) if tiny else ((1, 8192), (32, 2048), (128, 1024)):
        took = _time(backend, [(context, 1)] * count, device, dtype, size)
        read = 2 * count * context * _PLAIN.kv_heads * _PLAIN.key_dim * dtype.itemsize
        found[f"decode {count} x {context}"] = {"us": round(took * 1e6, 1), "of_copy": round(read / copy / took, 3)}
    for tokens in (64,) if tiny else (2048, 8192):
        took = _time(backend, [(0, tokens)], device, dtype, size)
        needed = 4 * _PLAIN.heads * _PLAIN.key_dim * tokens * tokens / 2
        found[f"prefill {tokens}"] = {"us": round(took * 1e6, 1), "of_matrix_rate": round(needed / flops / took, 3)}
    return found


def _time(
    backend: Backend, rows: list[tuple[int, int]], device: torch.device, dtype: torch.dtype, size: int
) -> float:
    """Seconds of one layer for sequences of (tokens before, new tokens), over scattered blocks."""
    width = max(-(-(before + count) // size) for before, count in rows)
    table = np.random.default_rng(0).permutation(width * len(rows)).astype(np.int32).reshape(len(rows), width)
    batch = Batch.of(rows, table, size, device)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

    keys, values = (random(table.size * size, _PLAIN.kv_heads, _PLAIN.key_dim) for _ in range(2))
    query = random(_PLAIN.heads, int(batch.host.starts[-1]), _PLAIN.key_dim).transpose(0, 1)
    call = Call(_PLAIN.key_dim**-0.5)
    backend.begin(batch)
    return seconds(lambda: backend.attend(query, keys, values, batch, call), device)


if __name__ == "__main__":
    raise SystemExit(main())
