"""`pdctl` as the blocks of README and guides call it: with a tiny model, and with an end.

`init` writes the tiny sample model and a free port instead of Gemma and 8000. Commands that run until Ctrl-C get it
when they have printed something. Doctor's exit codes for findings count as success: they depend on the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

PDCTL = [sys.executable, "-m", "pdctl"]
_MODEL = ("sample:gemma-3-270m", "sample:tiny-qwen3")


def main(words: list[str]) -> int:
    """Run one command and return its exit code."""
    if _is_endless(words):
        return _until_it_prints(words)
    if words[:1] == ["doctor"]:
        return _doctor(words)
    code = subprocess.call([*PDCTL, *words])
    if words[:1] == ["init"] and code == 0 and "--systemd" not in words:
        path = Path(next((word for word in words[1:] if not word.startswith("-")), "pdctl.toml"))
        text = path.read_text().replace(*_MODEL)
        path.write_text(text.replace("port = 8000", f"port = {os.environ['DOCUMENTED_PORT']}"))
    return code


def _is_endless(words: list[str]) -> bool:
    follows = words[:1] in (["events"], ["logs"]) and bool({"-f", "--follow"} & set(words))
    watches = bool({"-w", "--watch"} & set(words))
    return follows or watches or words[:1] == ["top"] or (words[:1] == ["up"] and not {"-d", "--detach"} & set(words))


def _until_it_prints(words: list[str]) -> int:
    """Ctrl-C after the first line; `up` prints more than one before it is ready."""
    wanted = "ready" if words[0] == "up" else ""
    with subprocess.Popen([*PDCTL, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
            if wanted in line:
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        code = process.wait(timeout=120)
    return 0 if code in (0, 130) else code


def _doctor(words: list[str]) -> int:
    done = subprocess.run([*PDCTL, *words], stderr=subprocess.PIPE, text=True)
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode if "error:" in done.stderr or done.returncode > 3 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
