"""A reader of stdout that has exited, as in `pdctl ... | head`, is no error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("words", [["doctor", "--list"], ["--help"], ["manual"], ["plan", "--json"]])
def test_nothing_is_said_and_the_exit_code_is_0(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-m", "pdctl", *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
