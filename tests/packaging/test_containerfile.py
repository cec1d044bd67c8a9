"""The Containerfile: what it copies exists, and its lines, run as a shell script, install a pdctl that answers."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pdctl import __version__
from tests.service import REPOSITORY

VARIANTS = ("cpu", "cuda")


class Line(NamedTuple):
    """One instruction. `stage`: the name of its stage."""

    stage: str
    word: str
    rest: str


def lines() -> list[Line]:
    """The instructions of the Containerfile."""
    found, stage = [], ""
    for text in re.sub(r"\\\n", " ", (REPOSITORY / "Containerfile").read_text()).splitlines():
        if not text.strip() or text.startswith("#"):
            continue
        word, _, rest = text.partition(" ")
        if word == "FROM":
            stage = rest.rpartition(" AS ")[2]
        found.append(Line(stage, word, rest))
    return found


def test_every_source_of_a_copy_exists_and_reaches_the_builder() -> None:
    shown = [line[1:] for line in (REPOSITORY / ".containerignore").read_text().splitlines() if line.startswith("!")]
    copies = [line for line in lines() if line.word == "COPY"]
    assert len(copies) > 4
    for line in copies:
        *sources, _ = [word for word in line.rest.split() if not word.startswith("--")]
        if "--from=" in line.rest:
            assert f"--from={lines()[0].stage}" in line.rest
            continue
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert any(fnmatch.fnmatch(source, name) for name in shown), f"{source} is ignored"
    assert (REPOSITORY / ".dockerignore").resolve() == (REPOSITORY / ".containerignore").resolve()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_starts_pdctl_as_a_user_without_privileges(variant: str) -> None:
    of_variant = {line.word: line.rest for line in lines() if line.stage == variant}
    assert json.loads(of_variant["ENTRYPOINT"]) == ["pdctl"]
    assert json.loads(of_variant["CMD"]) == ["up"]
    assert of_variant["USER"] == "pdctl"
    assert of_variant["STOPSIGNAL"] == "SIGTERM", "the supervisor drains and stops on it"
    places = [line.rest for line in lines() if line.stage == variant and line.word == "ENV"]
    for name in ("PDCTL_RUN", "PDCTL_STATE", "PDCTL_CACHE"):
        assert any(f"{name}=/var/lib/pdctl/" in place for place in places)
    assert variant != "cpu" or "EXTRAS=[engine]" in [x.rest for x in lines() if x.word == "ARG" and x.stage == variant]


def script(stage: str, root: Path) -> str:
    """The stage as a shell script in a folder instead of a root. Left out: packages of the system, and users."""
    found = ["set -eu"]
    for line in lines():
        if line.stage != stage:
            continue
        if line.word == "ARG":
            name, _, value = line.rest.partition("=")
            found.append(f': "${{{name}={value}}}"')
        elif line.word == "WORKDIR":
            found.append(f"mkdir -p {line.rest}; cd {line.rest}")
        elif line.word == "COPY":
            *sources, target = [word for word in line.rest.split() if not word.startswith("--")]
            base = "" if "--from=" in line.rest else f"{REPOSITORY}/"
            same = len(sources) == 1 and sources[0] == target
            found += [] if same and not base else [f"mkdir -p $(dirname {target}x)"]
            found += [f"cp -r {base}{source} {target}" for source in sources if base]
        elif line.word == "RUN" and not line.rest.startswith(("apt-get", "useradd")):
            found.append(line.rest)
        elif line.word == "ENV":
            found += [f"export {pair}" for pair in line.rest.split()]
    text = "\n".join(found)
    for folder in ("/src", "/build", "/wheels", "/opt/pdctl", "/var/lib/pdctl", "/etc/pdctl"):
        text = re.sub(rf"(?<![\w.])(?<!{re.escape(str(REPOSITORY))}){folder}\b", f"{root}{folder}", text)
    return text


def test_lines_are_shell() -> None:
    for line in lines():
        if line.word == "RUN":
            done = subprocess.run(["sh", "-n", "-c", line.rest], capture_output=True, text=True)
            assert done.returncode == 0, (line.rest, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_lines_install_a_pdctl_that_answers(variant: str, tmp_path: Path) -> None:
    """Without the engine: torch alone is gigabytes."""
    env = {**os.environ, "EXTRAS": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    for stage in ("wheel", variant):
        text = script(stage, tmp_path)
        assert f" {tmp_path}/" in text
        done = subprocess.run(["sh", "-c", text], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, text + done.stderr
    pdctl = tmp_path / "opt/pdctl/bin/pdctl"
    done = subprocess.run([pdctl, "--version"], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"pdctl {__version__}\n"
    assert (tmp_path / "opt/pdctl/share/man/man1/pdctl.1").is_file()
