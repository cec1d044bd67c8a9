"""Where results of `pdctl bench` go besides the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pdctl import console
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.bench.metrics import Figures


def write(path: Path, text: str) -> None:
    """Raises PdctlError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as failure:
        raise PdctlError(f"{path} cannot be written: {failure.strerror}") from None
    console.note(f"written: {path}")


def drawing() -> None:
    """Raises PdctlError where plots cannot be drawn; asked before a run that takes minutes."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise PdctlError("--png needs matplotlib", "pip install 'pdctl[plots]'; or --html, which needs nothing")


def draw(folder: Path, results: dict[str, Figures]) -> None:
    """Plots of one result, or of several by name. Raises PdctlError."""
    from pdctl.bench.pictures import pictures

    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = pictures(folder, results)
    except OSError as failure:
        raise PdctlError(f"{folder} cannot be written: {failure.strerror}") from None
    console.note(f"written to {folder}: {', '.join(names)}")
