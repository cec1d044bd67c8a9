"""Completions typed in real shells: bash, zsh and fish."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdctl.cli import app
from pdctl.commands.shell import names
from pdctl.commands.shell.scripts import SCRIPTS, place_of
from pdctl.supervisor.rundir.adoption import PLAN
from tests.service import CLI

SHELLS = ("bash", "zsh", "fish")
PROMPT = "READY>"
_PLAN = """{"processes": [
  {"name": "prefill-0", "group": "prefill", "role": "prefill", "kind": "builtin"},
  {"name": "decode-0", "group": "decode", "role": "decode", "kind": "builtin"},
  {"name": "decode-1", "group": "decode", "role": "decode", "kind": "builtin"},
  {"name": "proxy", "group": "", "role": "proxy", "kind": "proxy"}]}"""
_START = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "PS1='{prompt} '; {load}"),
    "zsh": (["zsh", "-f", "-i"], "PS1='{prompt} '; autoload -Uz compinit; compinit -u -D; {load}"),
    "fish": (["fish", "--no-config", "-i"], "{load} | source; function fish_prompt; echo -n '{prompt} '; end"),
}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a machine with a running service, `alpha`, with logs of another, `beta`, and with a `pdctl`
    that writes its words into a file instead of doing anything."""
    run = tmp_path / "run/alpha"
    run.mkdir(parents=True)
    (run / PLAN).write_text(_PLAN)
    (tmp_path / "state/beta/logs").mkdir(parents=True)
    for name in ("one.log", "two.log"):
        (tmp_path / "state/beta/logs" / name).touch()
    (tmp_path / "files/inner").mkdir(parents=True)
    (tmp_path / "files/my service.toml").touch()
    command = " ".join(f"'{word}'" for word in CLI)
    script = f"""#!/bin/sh
if [ -n "$PDCTL_COMPLETION" ] || [ "$1" = completion ]; then exec {command} "$@"; fi
printf '%s\\n' "$@" > {tmp_path}/words.new; mv {tmp_path}/words.new {tmp_path}/words
"""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pdctl").write_text(script)
    (tmp_path / "bin/pdctl").chmod(0o755)
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as its supervisor does
        yield {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "xterm", "PYTHONPATH": path,
            "PDCTL_RUN": str(tmp_path / "run"), "PDCTL_STATE": str(tmp_path / "state"), "LANG": "C.UTF-8",
        }  # fmt: skip


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, shell: str, env: dict[str, str]) -> None:
        self._folder, self._seen = Path(env["HOME"]), ""
        argv, start = _START[shell]
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(self._folder / "files")
            os.execvpe(argv[0], argv, env)
        load = "pdctl completion fish" if shell == "fish" else f'eval "$(pdctl completion {shell})"'
        quoted = PROMPT[:3] + "''" + PROMPT[3:]  # what is typed is echoed, and must not look like the prompt
        self._type(start.format(prompt=quoted, load=load) + "\r")
        self.until(PROMPT)

    def _type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def until(self, text: str) -> None:
        """Read what the shell writes until this appears."""
        deadline = time.monotonic() + 120
        while text not in self._seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self._seen[-2000:]!r}"
            if select.select([self._terminal], [], [], 1.0)[0]:
                self._seen += os.read(self._terminal, 65536).decode(errors="replace")

    def words(self, line: str) -> list[str]:
        """The words that `pdctl` was run with after this was typed; a tab completes."""
        (self._folder / "words").unlink(missing_ok=True)
        self._seen = ""
        self._type(line + "\r")
        deadline = time.monotonic() + 120
        while not (self._folder / "words").exists():
            assert time.monotonic() < deadline, f"not run: {self._seen[-2000:]!r}"
            if select.select([self._terminal], [], [], 0.05)[0]:
                self._seen += os.read(self._terminal, 65536).decode(errors="replace")
        self.until(PROMPT)
        return (self._folder / "words").read_text().splitlines()

    def shown(self, line: str, *texts: str) -> None:
        """All of these texts appear after this was typed."""
        self._seen = ""
        self._type(line)
        for text in texts:
            self.until(text)
        self._type("\x03")

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._terminal)


@pytest.fixture(params=SHELLS)
def terminal(request: pytest.FixtureRequest, machine: dict[str, str]) -> Iterator[Terminal]:
    if shutil.which(request.param) is None:
        pytest.skip(f"NOT TESTED: {request.param} is not installed")
    found = Terminal(request.param, machine)
    yield found
    found.close()


def test_completions_are_typed(terminal: Terminal) -> None:
    assert terminal.words("pdctl resta\tproxy") == ["restart", "proxy"]
    assert terminal.words("pdctl stat\t") == ["status"]
    assert terminal.words("pdctl bench prof\t") == ["bench", "profile"]
    assert terminal.words("pdctl why prox\t") == ["why", "proxy"]
    assert terminal.words("pdctl why -s alp\tdecode-1") == ["why", "-s", "alpha", "decode-1"]
    assert terminal.words("pdctl why --service=alp\tdecode-1") == ["why", "--service=alpha", "decode-1"]
    assert terminal.words("pdctl role decode-1 pref\t") == ["role", "decode-1", "prefill"]
    assert terminal.words("pdctl scale dec\t3") == ["scale", "decode=3"]
    assert terminal.words("pdctl logs -s beta tw\t") == ["logs", "-s", "beta", "two"]
    assert terminal.words("pdctl restart --dra\tproxy") == ["restart", "--drain", "proxy"]
    assert terminal.words("pdctl plan -f my\t") == ["plan", "-f", "my service.toml"]
    assert terminal.words("pdctl plan --file=my\t") == ["plan", "--file=my service.toml"]
    *words, folder = terminal.words("pdctl bench serve --png inn\t")
    assert (words, folder.rstrip("/")) == (["bench", "serve", "--png"], "inner")
    terminal.shown("pdctl restart \t\t", "decode-0", "decode-1", "prefill", "proxy")


def test_nothing_is_completed_for_a_service_that_is_not_there(machine: dict[str, str]) -> None:
    for line in ("pdctl restart -s gamma ", "pdctl why -f nowhere.toml x"):
        env = {**machine, "PDCTL_COMPLETION": "bash"}
        done = subprocess.run([*CLI, line], env=env, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_installed_where_its_shell_looks(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    done = CliRunner().invoke(app, ["completion", shell, "--install"])
    assert done.exit_code == 0
    assert place_of(shell).is_relative_to(tmp_path)
    assert place_of(shell).read_text() == SCRIPTS[shell] == CliRunner().invoke(app, ["completion", shell]).stdout


def test_the_plan_of_a_running_service_is_where_the_supervisor_writes_it() -> None:
    assert names.PLAN == PLAN
