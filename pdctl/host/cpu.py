"""What this host's CPUs can compute."""

from __future__ import annotations

from pathlib import Path

# Of Intel (Cooper Lake, Sapphire Rapids and newer) and AMD (Zen 4 and newer).
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def computes_bfloat16(proc_root: Path = Path("/proc")) -> bool:
    """Whether the first CPU multiplies bfloat16 in hardware; others are several times slower in it than in float32."""
    try:
        lines = (proc_root / "cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not _BFLOAT16_FLAGS.isdisjoint(flags)
