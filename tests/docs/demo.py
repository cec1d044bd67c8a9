"""Records docs/images/demo.svg: real commands in a terminal, with their output and times. Run by `scripts/docs demo`.

Starts a service with the sample model, kills its decode engine in the middle of an answer, and looks at what
happened."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from pdctl.control_api import SOCKET, ControlClient
from tests.docs.terminal import Recording, drawn

OUTPUT = Path(__file__).parents[2] / "docs" / "images" / "demo.svg"
COLUMNS, ROWS = 112, 26
# Waits are shortened to this, and the picture says so.
LONGEST_WAIT_S = 1.2
_PAUSE_S = 1.5
_QUESTION = 'pdctl ask --max-tokens 150 --temperature 0.8 "Once upon a time"'


class Session:
    """A terminal in a folder of its own, in which commands are typed one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recording = Recording(COLUMNS)
        self.env = {
            **os.environ,
            "PDCTL_RUN": str(folder / "r"),
            "PDCTL_STATE": str(folder / "logs"),
            "COLUMNS": str(COLUMNS),
            "LINES": str(ROWS),
            "TERM": "xterm-256color",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def type(self, command: str, on_output: Callable[[int], None] = lambda letters: None) -> None:
        """Run a command. `on_output` is called with the number of bytes so far, whenever there are more."""
        self.recording.wait(_PAUSE_S if self.recording.now else 0)
        self.recording.write("$ ", "prompt")
        self.recording.write(command + "\n", "command")
        self.recording.wait(0.4)
        total, before = 0, time.monotonic()
        for chunk in self._output_of(command):
            now = time.monotonic()
            self.recording.wait(min(now - before, LONGEST_WAIT_S))
            before, total = now, total + len(chunk)
            self.recording.write(chunk.decode(errors="replace"))
            on_output(total)

    def _output_of(self, command: str) -> Iterator[bytes]:
        ours, theirs = pty.openpty()
        try:
            with subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
            ) as process:
                os.close(theirs)
                deadline = time.monotonic() + 300
                while time.monotonic() < deadline:
                    if not select.select([ours], [], [], 1)[0]:
                        continue
                    try:
                        chunk = os.read(ours, 4096)
                    except OSError:  # nobody has the other side any more
                        break
                    yield chunk
                code = process.wait(timeout=30)
                assert code == 0, f"{command}: exit code {code}"
        finally:
            os.close(ours)

    def control(self) -> ControlClient:
        """Of the running service."""
        (run_dir,) = (path.parent for path in (self.folder / "r").glob(f"*/{SOCKET}"))
        return ControlClient(run_dir)


def record(folder: Path) -> Recording:
    """Run the whole scene."""
    session = Session(folder)
    subprocess.run(["pdctl", "init"], cwd=folder, env=session.env, check=True, capture_output=True)
    topology = folder / "pdctl.toml"
    # Such short prompts would be computed by the decode engine itself, and no KV would move.
    topology.write_text(topology.read_text().replace('role = "decode"', 'role = "decode"\ninline_prefill = false'))
    try:
        session.type("pdctl up -d")
        status = session.control().status()
        pid = next(process.pid for process in status.processes if process.name == "decode-0")
        killed: list[int] = []

        def kill(letters: int) -> None:
            if letters > 220 and not killed and pid is not None:
                killed.append(pid)
                session.recording.beside(f"$ kill -9 {pid}        # decode-0, while it answers")
                psutil.Process(pid).kill()

        session.type(_QUESTION, kill)
        assert killed, "the answer was too short"
        session.type("pdctl why decode-0 --lines 2")
        _until_ready(session.control())
        session.type('pdctl ask --max-tokens 12 "The capital of France is"')
        session.type("pdctl status")
        session.type("pdctl kv --leaks")
        session.type("pdctl down")
    finally:
        subprocess.run(["pdctl", "down", "--now"], cwd=folder, env=session.env, capture_output=True, check=False)
    return session.recording


def _until_ready(control: ControlClient) -> None:
    deadline = time.monotonic() + 120
    while control.status().state != "ready":
        assert time.monotonic() < deadline, "the engine is not back"
        time.sleep(0.2)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="demo-") as made:
        note = f"pauses longer than {LONGEST_WAIT_S:g} s are shortened"
        OUTPUT.write_text(drawn(record(Path(made)), ROWS, note), encoding="utf-8")
