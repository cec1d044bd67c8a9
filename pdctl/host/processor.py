"""Which processor this is."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def cpu_name(proc_root: Path = Path("/proc")) -> str:
    """Vendor, family, model, stepping and name of the first CPU; "" if the kernel does not tell."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping")
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in (proc_root / "cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return " / ".join(found.get(name, "") for name in wanted)
