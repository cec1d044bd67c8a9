"""What a worker counts, and saves for the others."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pdctl.proxy.telemetry.metrics import Metrics


def test_counts_that_cannot_be_saved_are_told_once_and_saved_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk must not end the proxy."""
    folder = tmp_path / "counts"
    folder.write_text("no folder")
    metrics = Metrics("m", 1.0, 1.0, folder, "proxy")
    metrics.failed(500)
    with caplog.at_level(logging.WARNING):
        metrics.save()
        metrics.save()
    assert [record.message for record in caplog.records if "cannot be saved" in record.message] == [
        f"the counts cannot be saved for other workers: {caplog.records[0].args[0]}"  # type: ignore[index]
    ]
    folder.unlink()
    folder.mkdir()
    metrics.save()
    assert (folder / "proxy.json").exists()
