"""The version of a package in any Python environment, read from its files: the environment's Python is not executed."""

from __future__ import annotations

import re
from pathlib import Path

# Where an interpreter at PREFIX/bin/python finds packages, relative to PREFIX: virtual environments and most systems,
# then Debian's.
_PLACES = (
    "lib/python3*/site-packages", "lib64/python3*/site-packages", "local/lib/python3*/dist-packages",
    "lib/python3/dist-packages",
)  # fmt: skip


def installed_package(python: str, names: tuple[str, ...]) -> tuple[str, str] | None:
    """The first of these packages that the environment of `python` has, and its version; None if it has none."""
    prefix = Path(python).parent.parent
    for name in names:
        # PEP 503 and the wheel format: runs of "-", "_" and "." are equal, and are written as "_" in a file name.
        stem = re.sub(r"[-_.]+", "_", name).lower()
        for place in _PLACES:
            for found in sorted(prefix.glob(f"{place}/{stem}-*.dist-info")):
                return name, found.name.removesuffix(".dist-info")[len(stem) + 1 :]
    return None
