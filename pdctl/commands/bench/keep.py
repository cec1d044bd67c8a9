"""Write results of `pdctl bench` to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pdctl import console
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.bench.measurements import Measurements
    from pdctl.bench.report.observations import Curves


def write(path: Path, text: str) -> None:
    """Write a file and report its name. Raises PdctlError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as failure:
        raise PdctlError(f"{path} cannot be written: {failure.strerror}") from None
    console.note(f"written: {path}")


def drawing() -> None:
    """Raise PdctlError if plots cannot be drawn. Called before a run that takes minutes."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise PdctlError("--png needs matplotlib", "pip install 'pdctl[plots]', or use --html, which does not need it")


def draw(folder: Path, results: dict[str, Measurements]) -> None:
    """Write plots of one result, or of several by name. Raises PdctlError."""
    from pdctl.bench.report.pictures import pictures

    _into(folder, lambda: pictures(folder, results))


def draw_curves(folder: Path, found: dict[str, Curves]) -> None:
    """Write plots of measured curves, by file name. Raises PdctlError."""
    from pdctl.bench.report.pictures import curve_pictures

    _into(folder, lambda: curve_pictures(folder, found))


def _into(folder: Path, drawn: Callable[[], list[str]]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = drawn()
    except OSError as failure:
        raise PdctlError(f"{folder} cannot be written: {failure.strerror}") from None
    console.note(f"written to {folder}: {', '.join(names)}")


def keep_curves(
    found: dict[str, Curves], title: str, summary: str, table: tuple[list[str], list[list[str]]], page: Path | None,
    pictures: Path | None, note: str = "",
) -> None:  # fmt: skip
    """Write a page, pictures, both or neither. Raises PdctlError."""
    if page is not None:
        from pdctl.bench.report.page import curves

        write(page, curves(list(found.values()), title, summary, table, note))
    if pictures is not None:
        draw_curves(pictures, found)
