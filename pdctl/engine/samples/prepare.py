"""Prepare a model: convert a sample, or download a Hub snapshot. Prints the directory as the last line."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pdctl.engine.samples import CannotPrepare, Progress


def main(argv: list[str]) -> int:
    """`prepare SPEC PATH`: 0 and the path on stdout, or 1 and the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pdctl.engine prepare")
    parser.add_argument("spec")
    parser.add_argument("path")
    found = parser.parse_args(argv)
    try:
        path = prepare(found.spec, found.path, show_progress)
    except CannotPrepare as failure:
        sys.stderr.write(f"error: {failure}\n" + (f"hint: {failure.hint}\n" if failure.hint else ""))
        return 1
    sys.stdout.write(path + "\n")
    return 0


def prepare(spec: str, path: str, progress: Progress) -> str:
    """The directory to load `spec` from, created if it is missing. Raises CannotPrepare."""
    if spec == "sample:tiny-qwen3":
        from pdctl.engine.samples.tiny import build

        return _into_place(Path(path), build, progress)
    if spec == "sample:tiny-chat":
        from pdctl.engine.samples.tiny import build_chat

        return _into_place(Path(path), build_chat, progress)
    if spec == "sample:gemma-3-270m":
        from pdctl.engine.samples.gemma import build

        return _into_place(Path(path), build, progress)
    return _snapshot(spec)


def show_progress(what: str, fraction: float) -> None:
    """Show a progress bar on a terminal, or one line per tenth elsewhere."""
    bar = "#" * int(fraction * 24)
    if sys.stderr.isatty():
        sys.stderr.write(f"\r  [{bar:<24}] {fraction:4.0%} {what:<32}" + ("\n" if fraction >= 1 else ""))
    else:
        sys.stderr.write(f"  {fraction:4.0%} {what}\n")
    sys.stderr.flush()


def _into_place(target: Path, build: Callable[[Path, Progress], None], progress: Progress) -> str:
    """Build in a temporary folder and rename it, so that no one sees a partial model and two builds do not conflict."""
    if (target / "config.json").is_file():
        return str(target)
    from transformers.utils import logging

    logging.disable_progress_bar()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(scratch, progress)
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    except OSError as failure:
        raise CannotPrepare(f"the model cannot be written to {target}: {failure}") from failure
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return str(target)


def _snapshot(spec: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
    try:
        return str(snapshot_download(spec, allow_patterns=patterns, token=os.environ.get("HF_TOKEN") or None))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as failure:
        first = str(failure).strip().splitlines()[0]
        hint = "check the name; or name a local directory; or check that this machine reaches the Hub"
        raise CannotPrepare(
            f"model {spec!r} was not found: no such directory, and the Hugging Face Hub gave: {first}", hint
        ) from failure
