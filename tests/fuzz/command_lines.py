"""Nearly valid command lines: exit code 0 or 1 with a useful message; never a traceback, never silence."""

from __future__ import annotations

import random
import re
import subprocess
import time

from tests.service import CLI, Run, temporary_run

_VERBS = [
    ["status"], ["plan"], ["logs"], ["events"], ["why"], ["restart"], ["stop"], ["start"], ["drain"], ["scale"],
    ["apply"], ["kv"], ["ask"], ["key"], ["down"], ["init"], ["doctor"], ["doctor", "rdma"], ["doctor", "gpu"],
    ["bench", "serve"], ["bench", "sweep"], ["bench", "compare"], ["bench", "chaos"], ["bench", "transfer"],
    ["bench", "profile"], ["bench", "report"], ["up", "-f", "/nowhere/x.toml"], [], ["unheard-of"],
]  # fmt: skip
_WORDS = [
    "x", "", "-", "--", "-h", "--json", "--file", "/dev/null", "/", "--service", "t", "-s", "../..", "decode-0", "all",
    "--since", "10m", "9" * 30, "-1", "1e999", "nan", "é", "\U0001f600", "a\nb", "a b", "--unheard-of", "--ibstatus",
    "mlx5_0:1", "--rate", "0", "--url", "http://127.0.0.1:1", "not a url", "http://[", "--n", "-n", "--out",
    "/dev/full", "--input-len", "x,y", "--drain", "--now", "--list", "--seed", "1.5", "--trace", "decode=2", "=",
    "decode=", "--leaks",
    "--revoke", "--follow=maybe", "--timeout", "--force", "--tail", "--level", "INFO", "\x7f", "y" * 4000, "%s", "{}",
]  # fmt: skip
_BAD = re.compile(r"Traceback|unexpected:|Value error|Errno|<class|object at 0x")
_LONGEST_S = 60


def walk(seed: int, seconds: float) -> list[str]:
    """Returns findings: a command line and its outcome."""
    with temporary_run() as run:
        return _walk(run, random.Random(seed), seconds)


def _walk(run: Run, chance: random.Random, seconds: float) -> list[str]:
    run.write('[service]\nmodel = "sample:tiny-qwen3"\n', "small.toml")
    run.write("[service\n", "broken.toml")
    run.write("\x00\x01", "bytes.toml")
    words = [*_WORDS, "small.toml", "broken.toml", "bytes.toml", str(run.folder)]
    found: list[str] = []
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        count += 1
        argv = [*chance.choice(_VERBS), *(chance.choice(words) for _ in range(chance.randrange(5)))]
        if reason := _outcome(run, argv):
            found.append(f"{argv}: {reason}")
    print(f"{count} command lines")
    for process in run.processes():
        found.append(f"left running: {process.cmdline()}")
        process.kill()
    return found


def _outcome(run: Run, argv: list[str]) -> str:
    try:
        done = subprocess.run(
            [*CLI, *argv], env=run.env, cwd=run.folder, capture_output=True, timeout=_LONGEST_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end within {_LONGEST_S} s"
    said = (done.stdout + done.stderr).decode(errors="replace")
    if done.returncode not in (0, 1):
        return f"exit code {done.returncode}: {said[-400:]}"
    if bad := _BAD.search(said):
        return f"it says {bad[0]!r}: {said[-400:]}"
    if done.returncode == 1 and not done.stderr.strip() and not done.stdout.strip():
        return "it fails without a word"
    return ""
