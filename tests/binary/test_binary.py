"""The binary that scripts/binary makes: how it unpacks itself, and machines that lack what others have.

It is that of PDCTL_PROGRAM, else the one in dist/.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from pdctl import __version__
from tests.e2e.test_proxy import Worker, text
from tests.service import PROGRAM, REPOSITORY, Run, running, topology

pytestmark = pytest.mark.e2e
BINARY = Path(PROGRAM or REPOSITORY / f"dist/pdctl-{__version__}-linux-{os.uname().machine}")
if not BINARY.is_file():
    pytest.skip(f"NOT TESTED: {BINARY} is not there; make it with scripts/binary", allow_module_level=True)

# A process of any kind.
JOB = """
[supervisor]
grace_s = 5
stable_s = 1
[[processes]]
name = "job"
command = ["/bin/sleep", "1000"]
ready = "none"
"""


@pytest.fixture
def commands() -> Iterator[str]:
    """A topology with a process, and with engines that run outside."""
    workers = [Worker("prefill", 0), Worker("decode", 0)]
    yield text(workers, rest=JOB)
    for worker in workers:
        worker.stop()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def run(cache: Path, *words: str, program: Path = BINARY, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "HOME": str(cache.parent), "PDCTL_UNPACK": str(cache), **extra}
    return subprocess.run([program, *words], env=env, capture_output=True, text=True, timeout=300)


def trees(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.name != "lock")


# -- unpacking ---------------------------------------------------------------------------------------------


def test_it_is_unpacked_once(cache: Path) -> None:
    assert run(cache, "--version").stdout == f"pdctl {__version__}\n"
    [tree] = trees(cache)
    before = (tree.stat().st_ino, (tree / "pdctl").stat().st_ino)
    assert tree.name.startswith(f"{__version__}-")
    assert run(cache, "--version").returncode == 0
    assert [(tree.stat().st_ino, (tree / "pdctl").stat().st_ino) for tree in trees(cache)] == [before]


def test_many_first_starts_at_once_unpack_it_once(cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: run(cache, "--version"), range(8)))
    assert {(one.returncode, one.stdout, one.stderr) for one in done} == {(0, f"pdctl {__version__}\n", "")}
    assert len(trees(cache)) == 1


def test_a_damaged_or_incomplete_folder_is_replaced(cache: Path) -> None:
    run(cache, "--version")
    [tree] = trees(cache)
    library = next(tree.glob("_internal/libpython*"))
    for damage in (lambda: library.write_bytes(b"x"), library.unlink, lambda: shutil.rmtree(tree / "_internal")):
        damage()
        assert run(cache, "--version").stdout == f"pdctl {__version__}\n"
        assert trees(cache) == [tree]
    killed = cache / ".new-killed"
    killed.mkdir()
    (tree / "pdctl").unlink()
    assert run(cache, "--version").returncode == 0
    assert not killed.exists(), "what a killed unpacker left"


def test_a_folder_that_others_can_write_to_is_not_used(cache: Path) -> None:
    run(cache, "--version")
    [tree] = trees(cache)
    cache.chmod(0o777)
    tree.chmod(0o777)
    done = run(cache, "--version")
    assert done.returncode == 2
    assert "others can write to it" in done.stderr
    assert "PDCTL_UNPACK" in done.stderr


@pytest.mark.parametrize("kept", [0, 100, 20_000, -1])
def test_a_file_that_was_cut_says_so(cache: Path, kept: int) -> None:
    cut = cache.parent / "cut"
    content = BINARY.read_bytes()
    launcher = len(content) - 1 if kept < 0 else _build().TRAILER.unpack(content[-_build().TRAILER.size :])[0] + kept
    cut.write_bytes(content[:launcher])
    cut.chmod(0o755)
    done = run(cache, "--version", program=cut)
    assert done.returncode == 2
    assert "damaged or incomplete: copy it again" in done.stderr


def test_a_changed_byte_is_found_when_it_is_unpacked(cache: Path) -> None:
    content = bytearray(BINARY.read_bytes())
    start, size, *_ = _build().TRAILER.unpack(content[-_build().TRAILER.size :])
    content[start + size // 2] ^= 1
    changed = cache.parent / "changed"
    changed.write_bytes(content)
    changed.chmod(0o755)
    done = run(cache, "--version", program=changed)
    assert done.returncode == 2
    assert "damaged" in done.stderr
    assert not [tree for tree in trees(cache) if not tree.name.startswith(".new-")]


def _build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("binary_build", REPOSITORY / "scripts/_binary/build.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_two_versions_side_by_side(cache: Path) -> None:
    run(cache, "--version")
    [tree] = trees(cache)
    build, content = _build(), BINARY.read_bytes()
    launcher, other = cache.parent / "launcher", cache.parent / "pdctl-0.0.9"
    launcher.write_bytes(content[: build.TRAILER.unpack(content[-build.TRAILER.size :])[0]])
    changed = shutil.copytree(tree, cache.parent / "changed", symlinks=True)
    (changed / "_internal/note").write_text("another version")
    key = build.pack(changed, launcher, other, "0.0.9")
    both = [cache / key, tree]
    for program in (other, BINARY, other):
        assert run(cache, "--version", program=program).returncode == 0
        assert json.loads(run(cache, "version", "--json", program=program).stdout)["program"] == str(program)
    assert trees(cache) == sorted(both)
    assert (cache / key / "_internal/note").exists()


def test_a_unit_of_systemd_names_the_file_itself(cache: Path) -> None:
    unit = run(cache, "init", "--systemd", "/etc/pdctl.toml").stdout
    assert f"ExecStart={BINARY.resolve()} up --file /etc/pdctl.toml" in unit


def test_engines_need_a_python(cache: Path) -> None:
    file = cache.parent / "x.toml"
    file.write_text(topology())
    done = run(cache, "plan", "-f", str(file))
    assert done.returncode == 1
    assert "python is missing: this pdctl is a binary" in done.stderr
    assert "pip install 'pdctl[engine]'" in done.stderr
    transfer = run(cache, "doctor", "transfer", "--mib", "1")
    assert transfer.returncode == 1
    assert "timing transfers needs pdctl's engine" in transfer.stderr


# -- a service ---------------------------------------------------------------------------------------------


@pytest.fixture
def binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.service.CLI", [str(BINARY)])
    monkeypatch.setattr("tests.service.PROGRAM", str(BINARY))


def test_builtin_engines_run_in_their_own_environment(run: Run, binary: None) -> None:
    """Two engines under `python` of their groups; proxy and supervisor under the binary."""
    with running(run, topology(engine_extra=f'python = "{sys.executable}"', kv_cache_gb=0.1)) as service:
        assert len(service.complete("hello", max_tokens=5, ignore_eos=True)["token_ids"]) == 5
        names = {process.name(): process.exe() for process in run.processes()}
        programs = {Path(exe).name.rstrip("0123456789.") for exe in names.values()}
        assert programs == {"pdctl", "python"}
        commands = {" ".join(process.cmdline()[1:4]): Path(process.exe()).name for process in run.processes()}
        assert next(exe for words, exe in commands.items() if "pdctl.proxy" in words) == "pdctl"
        assert next(exe for words, exe in commands.items() if "pdctl.engine core" in words).startswith("python")
        engine = next(process for process in run.processes() if "core" in process.cmdline())
        assert "_internal" not in engine.environ().get("LD_LIBRARY_PATH", "")


# -- other machines ----------------------------------------------------------------------------------------


def apart(script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script with mounts and processes of its own: all of them are gone afterwards."""
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", script, "sh", *words]
    return subprocess.run(
        argv, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **env}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def mounts() -> None:
    if os.getuid() != 0 or apart("mount -t tmpfs none /mnt").returncode != 0:
        pytest.skip("NOT TESTED: mounting needs root")


def _libraries(program: str) -> Iterator[str]:
    for line in subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout.splitlines():
        yield from (word for word in line.split() if word.startswith("/"))


@pytest.fixture
def empty_root(tmp_path: Path, commands: str) -> Path:
    """A root with glibc, `sleep` and the binary. No Python, no shell, no /tmp."""
    root = tmp_path / "root"
    glibc = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1")
    libc = Path(next(path for path in _libraries("/bin/sleep") if "libc.so" in path))
    copied = [*_libraries("/bin/sleep"), *(str(libc.with_name(name)) for name in glibc)]
    for path in dict.fromkeys([*copied, "/bin/sleep"]):
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in ("proc", "dev", "root", "sys"):
        (root / name).mkdir()
    shutil.copy(BINARY, root / "pdctl")
    (root / "pdctl.toml").write_text(commands)
    return root


def test_a_machine_without_python(mounts: None, empty_root: Path) -> None:
    script = """
root=$1; mount -t proc proc $root/proc; mount --rbind /dev $root/dev; mount --bind /sys $root/sys
inside() { env -i HOME=/root PATH=/bin /usr/sbin/chroot $root /pdctl "$@"; }
inside --version
code=0; inside doctor host net runtime > $root/doctor 2>&1 || code=$?; [ $code -le 3 ]
grep -q runtime $root/doctor || grep -q pdctl $root/doctor
inside plan
inside up -d
inside status
inside restart job
inside down
"""
    done = apart(script, str(empty_root))
    assert done.returncode == 0, done.stderr + done.stdout + (empty_root / "doctor").read_text()
    assert f"pdctl {__version__}" in done.stdout
    assert "job is ready again" in done.stdout
    assert "service t: ready" in done.stdout
    assert "unexpected" not in (empty_root / "doctor").read_text() + done.stderr


def test_from_a_read_only_path_with_run_files_on_noexec(mounts: None, commands: str, tmp_path: Path) -> None:
    (tmp_path / "pdctl.toml").write_text(commands)
    for name in ("program", "run"):
        (tmp_path / name).mkdir()
    script = f"""
mount -t proc proc /proc; cd $1
cp {BINARY} program/pdctl; mount --bind program program; mount -o remount,bind,ro program
mount -t tmpfs -o noexec none run
! touch program/x 2>/dev/null
program/pdctl up -d; program/pdctl status; program/pdctl restart proxy; program/pdctl down
"""
    env = {"HOME": str(tmp_path), "PDCTL_RUN": f"{tmp_path}/run", "PDCTL_STATE": f"{tmp_path}/run/state"}
    done = apart(script, str(tmp_path), **env)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "proxy is ready again" in done.stdout


def test_a_place_that_is_mounted_noexec_is_passed_over(mounts: None, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    noexec = "mount -t proc proc /proc; mount -t tmpfs -o noexec none $1/home"
    script = f"{noexec}; mount -t tmpfs none /var/tmp; {BINARY} --version | cat; ls /var/tmp"
    done = apart(script, str(tmp_path), HOME=f"{tmp_path}/home")
    assert done.stdout.splitlines() == [f"pdctl {__version__}", f"pdctl-binary-{os.getuid()}"], done.stderr
    done = apart(f"{noexec}; PDCTL_UNPACK=$1/home {BINARY} --version", str(tmp_path))
    assert done.returncode == 2
    assert "mounted noexec" in done.stderr


def test_without_a_shell_and_setpriv_the_shim_starts_processes(mounts: None, empty_root: Path) -> None:
    """A process that the binary's shim starts dies with the supervisor."""
    script = """
root=$1; mount -t proc proc $root/proc; mount --rbind /dev $root/dev
inside() { env -i HOME=/root PATH=/bin /usr/sbin/chroot $root /pdctl "$@"; }
inside up -d
sleeper=$(pgrep -x sleep)
kill -9 $(pgrep -f '[m] pdctl.supervisor')
for n in $(seq 200); do
    case $(cut -d' ' -f3 /proc/$sleeper/stat 2>/dev/null) in Z|'') echo gone; exit ;; esac
    sleep 0.1
done
"""
    done = apart("mount -t proc proc /proc; " + script, str(empty_root))
    assert "gone" in done.stdout, done.stderr + done.stdout
