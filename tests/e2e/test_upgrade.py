"""Another version of pdctl, in an environment of its own, takes over a service under load."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

import pdctl
from tests.e2e.test_takeover import address, took_over
from tests.service import Run, pid_of, running, single, temporary_run
from tests.takeover.__main__ import serving
from tests.takeover.clients import Asked, Connection, Pace, completions

pytestmark = pytest.mark.e2e

NEWER = "9.9.9"
_STREAMS = 4
_VERSION = re.compile(rb'"system_fingerprint":"[^"]*"')


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with another version. Everything else is that of this environment."""
    folder = tmp_path_factory.mktemp("newer")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    shutil.copytree(Path(pdctl.__file__).parent, packages / "pdctl", ignore=shutil.ignore_patterns("__pycache__"))
    version = packages / "pdctl" / "__init__.py"
    version.write_text(version.read_text().replace(f'"{pdctl.__version__}"', f'"{NEWER}"'))
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


def with_newer(run: Run, python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Execute a command of the other version."""
    env = {name: value for name, value in run.env.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [python, "-m", "pdctl", *words], env=env, cwd=run.folder, capture_output=True, text=True, timeout=600
    )


def judged(answer: bytes) -> bytes:
    """The answer without its version, of which it has only one."""
    assert len(set(_VERSION.findall(answer))) == 1, "another version went on with it, but did not sign it"
    return _VERSION.sub(b"", answer)


def test_an_upgrade_under_load_cuts_nothing(tiny_model: Path, newer: Path) -> None:
    long = completions()["long"]
    asked = Asked(long.name, long.path, {**long.body, "max_tokens": 1500})
    with temporary_run() as run, serving(run, tiny_model) as service:
        before = service.status()
        assert before.version == pdctl.__version__
        told = with_newer(run, newer, "upgrade", "--dry-run")
        assert told.returncode == 0, told.stderr
        assert f"pdctl {pdctl.__version__} to {NEWER}" in told.stderr
        assert told.stdout.count(": restarted") == 3

        async def stream(found: list[bytes], is_over: asyncio.Event) -> None:
            """On one connection, one answer after the other."""
            async with Connection(address(service), Pace()) as connection:
                while True:
                    is_last = is_over.is_set()
                    await connection.send(asked.data)
                    found.append(judged((await connection.answer()).compared(asked)))
                    if is_last:
                        return

        async def work() -> None:
            async with Connection(address(service), Pace()) as quiet:
                await quiet.send(asked.data)
                expected = judged((await quiet.answer()).compared(asked))
            found: list[bytes] = []
            is_over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(_STREAMS):
                    tasks.create_task(stream(found, is_over))
                done = await asyncio.to_thread(with_newer, run, newer, "upgrade")
                is_over.set()
            assert done.returncode == 0, done.stderr
            assert f"t is supervised by pdctl {NEWER}" in done.stderr
            assert len(found) >= _STREAMS
            assert set(found) == {expected}

        asyncio.run(work())
        after = service.status()
        assert (after.version, after.supervisor_pid) == (NEWER, before.supervisor_pid)
        assert after.supervisor_epoch != before.supervisor_epoch
        for old, new in zip(before.processes, after.processes, strict=True):
            assert new.pid != old.pid
            assert Path(f"/proc/{pid_of(new)}/cmdline").read_bytes().split(b"\0")[0] == os.fsencode(newer)
        assert sum(int(str(told["resumed"])) for told in took_over(service)) > 0
        service.idle()
        again = with_newer(run, newer, "upgrade")
        assert again.returncode == 0, again.stderr
        assert [process.pid for process in service.status().processes] == [process.pid for process in after.processes]


def test_a_version_that_does_not_start_changes_nothing(run: Run, newer: Path) -> None:
    module = next(newer.parent.parent.glob("lib/python*/site-packages/pdctl")) / "supervisor" / "__main__.py"
    text = module.read_text()
    with running(run, single()) as service:
        before = service.status()
        module.write_text("import nothing_of_that_name\n")
        try:
            done = with_newer(run, newer, "upgrade")
        finally:
            module.write_text(text)
        assert done.returncode == 1
        assert "the supervisor of that version does not start: ModuleNotFoundError" in done.stderr
        assert service.status().supervisor_epoch == before.supervisor_epoch
