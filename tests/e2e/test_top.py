"""`pdctl top` in real terminals: tmux shows what a person would see, a bare pty what is left of it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.service import CLI, Run, Service, pid_of, running, single, temporary_run, topology, wait_until

pytestmark = pytest.mark.e2e
needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="NOT TESTED: no tmux")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with temporary_run() as run, running(run, topology()) as found:
        yield found


class Tmux:
    """A shell in a tmux of its own, seen and typed into as by a person."""

    def __init__(self, run: Run, socket: Path, width: int, height: int) -> None:
        self._base = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        self._env = {**run.env, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PS1": "$ "}
        self.tmux("new-session", "-d", "-x", str(width), "-y", str(height), "-s", "t", "-c", str(run.folder),
                  "env PS1='$ ' sh")  # fmt: skip

    def tmux(self, *words: str) -> str:
        done = subprocess.run([*self._base, *words], env=self._env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-t", "t", "-l", text)

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", "-t", "t", *keys)

    def screen(self, *options: str) -> str:
        return self.tmux("capture-pane", "-p", "-t", "t", *options)

    def told(self, form: str) -> str:
        return self.tmux("display-message", "-p", "-t", "t", form).strip()

    def resize(self, width: int, height: int) -> None:
        self.tmux("resize-window", "-t", "t", "-x", str(width), "-y", str(height))

    def wait_for(self, *words: str, gone: str = "") -> str:
        """The screen once it shows all words, and `gone` no more."""

        def shown() -> str:
            found = self.screen()
            return found if all(word in found for word in words) and (not gone or gone not in found) else ""

        try:
            return str(wait_until(shown, 60, f"{words} on the screen"))
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{self.screen()}") from None


@contextmanager
def tmux(run: Run, width: int, height: int) -> Iterator[Tmux]:
    with tempfile.TemporaryDirectory(prefix="pd-", dir="/tmp") as folder:
        made = Tmux(run, Path(folder) / "s", width, height)
        try:
            yield made
        finally:
            made.tmux("kill-server")


def keep(name: str, screen: str) -> None:
    """For docs: with PDCTL_KEEP_SCREENS=FOLDER, screens are written there."""
    if folder := os.environ.get("PDCTL_KEEP_SCREENS"):
        (Path(folder) / name).write_text(screen)


TOP = shlex.join([*CLI, "top"])


@needs_tmux
def test_a_crash_keys_and_two_sizes(service: Service) -> None:
    with tmux(service.run, 80, 24) as terminal:
        terminal.type("echo before\n")
        terminal.type(f"{TOP}; echo code $?; stty -a | tr ' ' '\\n' | grep -xE -- '-?(echo|icanon|isig)'\n")
        first = terminal.wait_for("t: ready", "prefill-0", "decode-0", "KV FROM", "EVENTS", "q quit")
        assert "before" not in first, "a screen of its own"
        assert all(len(line) <= 80 for line in first.splitlines())
        assert len(first.splitlines()) == 24
        assert "clients → proxy ● → prefill ● ─ shm → decode ●" in first
        # Load.
        service.complete("hello", max_tokens=32)
        terminal.wait_for("TTFT p50", gone="TTFT p50 -")
        keep("80x24.txt", terminal.screen())
        keep("80x24.ansi", terminal.screen("-e"))
        # A crash.
        before = service.process("decode-0")
        os.kill(pid_of(before), signal.SIGKILL)
        began = time.monotonic()
        terminal.wait_for("exited: killed by SIGKILL", gone="decode ●\n")
        print(f"a crash was on the screen after {time.monotonic() - began:.2f} s")
        keep("crash.ansi", terminal.screen("-e"))
        service.restarted(before)
        terminal.wait_for("decode ●\n")
        # A wide screen.
        terminal.resize(200, 50)
        wide = terminal.wait_for("TOPOLOGY", "→ ● decode-0", "ITL P50", "LEASES")
        assert all(len(line) <= 200 for line in wide.splitlines())
        assert len(wide.splitlines()) == 50
        keep("200x50.txt", wide)
        keep("200x50.ansi", terminal.screen("-e"))
        terminal.resize(80, 24)
        terminal.wait_for("q quit", gone="TOPOLOGY")
        # Keys: help, log, order, a restart that is not confirmed, and one that is.
        terminal.press("?")
        terminal.wait_for("between tokens: last 15 seconds")
        terminal.press("Escape")
        terminal.wait_for("▶ prefill-0", gone="between tokens")
        terminal.press("Down")
        terminal.wait_for("▶ decode-0")
        terminal.press("Enter")
        terminal.wait_for("log of decode-0  ready", gone="EVENTS")
        terminal.press("q")
        terminal.press("s")
        terminal.wait_for("s sort: PROCESS", "PROCESS▲")
        epoch = service.process("decode-0").epoch
        terminal.press("r")
        terminal.wait_for("Restart decode-0")
        terminal.press("n")
        terminal.wait_for("decode-0 was not restarted")
        assert service.process("decode-0").epoch == epoch
        terminal.press("r")
        terminal.wait_for("Restart decode-0")
        terminal.press("y")
        wait_until(lambda: service.process("decode-0").epoch != epoch, 120, "a restart")
        terminal.wait_for("restart requested")
        # The end.
        terminal.press("q")
        after = terminal.wait_for("code 0", "\necho\n")
        assert "before" in after, "the screen from before is back"
        assert "EVENTS" not in after
        assert [line.strip() for line in after.splitlines() if line.strip() in ("echo", "icanon", "isig")] == [
            "isig", "icanon", "echo",
        ]  # fmt: skip
        assert terminal.told("#{alternate_on} #{cursor_flag}") == "0 1"
        service.wait(lambda: service.process("decode-0").state == "ready", what="decode-0 is back")


@needs_tmux
def test_suspended_and_continued(service: Service) -> None:
    with tmux(service.run, 100, 30) as terminal:
        terminal.type(f"set -m; {TOP}\n")
        terminal.wait_for("q quit")
        terminal.press("C-z")
        terminal.wait_for("$ ", gone="q quit")
        assert terminal.told("#{alternate_on} #{cursor_flag}") == "0 1"
        terminal.type("fg\n")
        terminal.wait_for("q quit", "EVENTS")
        terminal.press("C-c")
        terminal.wait_for("$ ", gone="q quit")


@needs_tmux
def test_a_service_that_stops_meanwhile() -> None:
    with temporary_run() as run, running(run, single()), tmux(run, 100, 30) as terminal:
        terminal.type(f"{TOP}\n")
        terminal.wait_for("t: ready", "hybrid-0")
        run.cli("down", check=True)
        shown = terminal.wait_for("t: not running", "hybrid-0")
        assert "service 't' is not running" in shown
        run.cli("up", "-d", check=True)
        terminal.wait_for("t: ready", gone="not running")
        terminal.press("q")
        terminal.wait_for("$ ", gone="q quit")


# -- a bare pty --------------------------------------------------------------------------------------------


@contextmanager
def on_pty(run: Run, *words: str, **extra: str) -> Iterator[tuple[subprocess.Popen[bytes], int, Callable[[], bytes]]]:
    """The command on a terminal of 80x24: the process, our end of it, and what it has written so far."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {**run.env, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **extra}
    written = bytearray()

    def output() -> bytes:
        while select.select([ours], [], [], 0)[0]:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:
                break
            if not data:
                break
            written.extend(data)
        return bytes(written)

    with subprocess.Popen([*CLI, *words], env=env, cwd=run.folder, stdin=theirs, stdout=theirs,
                          stderr=theirs, start_new_session=True) as process:  # fmt: skip
        try:
            yield process, ours, output
        finally:
            process.kill()
            process.wait()
            os.close(theirs)
            os.close(ours)


@pytest.mark.parametrize("ending", ["q", "ctrl-c", "TERM"])
def test_the_terminal_is_given_back(service: Service, ending: str) -> None:
    with on_pty(service.run, "top") as (process, ours, output):
        before = termios.tcgetattr(ours)
        wait_until(lambda: b"q quit" in output(), 60, "the board")
        during = termios.tcgetattr(ours)
        assert not during[3] & (termios.ECHO | termios.ICANON)
        if ending == "TERM":
            process.terminate()
        else:
            os.write(ours, b"q" if ending == "q" else b"\x03")
        wait_until(lambda: output() is not None and process.poll() is not None, 60, "its end")
        assert process.returncode == (143 if ending == "TERM" else 0)
        assert termios.tcgetattr(ours) == before
        for on, off in ((b"\x1b[?1049h", b"\x1b[?1049l"), (b"\x1b[?25l", b"\x1b[?25h")):
            assert output().rindex(off) > output().rindex(on)
        assert b"Traceback" not in output()


def test_without_utf8_and_colours(service: Service) -> None:
    extra = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "NO_COLOR": "1"}
    with on_pty(service.run, "top", **extra) as (process, ours, output):
        wait_until(lambda: b"q quit" in output(), 60, "the board")
        os.write(ours, b"q")
        wait_until(lambda: output() is not None and process.poll() is not None, 60, "its end")
        assert output().isascii()
        assert b"\x1b[1m> \x1b[0mprefill-0" in output()
        assert b"\x1b[31m" not in output()


@pytest.mark.parametrize("how", ["no terminal", "dumb"])
def test_without_a_terminal_it_is_status(service: Service, how: str) -> None:
    if how == "dumb":
        with on_pty(service.run, "top", TERM="dumb") as (process, _, output):
            wait_until(lambda: output().count(b"service t: ready") > 1, 60, "two tables")
            process.send_signal(signal.SIGINT)
            wait_until(lambda: output() is not None and process.poll() is not None, 60, "its end")
            assert b"1049h" not in output()
            assert process.returncode == 130
        return
    with subprocess.Popen([*CLI, "top"], env=service.run.env, cwd=service.run.folder, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(12)]
        process.stdout.close()  # as `| head` does
        process.wait(60)
        assert process.stderr is not None
        assert process.stderr.read() == "no terminal: showing pdctl status -w\n"
    assert sum(line.startswith("service t: ready") for line in lines) >= 2


def test_no_service(service: Service) -> None:
    with on_pty(service.run, "top", "-s", "nothing") as (process, _, output):
        wait_until(lambda: output() is not None and process.poll() is not None, 60, "its end")
        assert process.returncode == 1
        assert b"service 'nothing' is not running" in output()
        assert b"1049h" not in output()


def test_no_other_verb_imports_rich() -> None:
    """Not counting typer, which has it for its tracebacks and does not load it."""
    script = "import sys, pdctl.cli; sys.exit('rich' in sys.modules or 'pdctl.commands.top.board' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
