"""Start a child: between fork and exec it gets its cgroup, death signal, CPU set, limits and stamp.

The supervisor has one thread, so a forked copy may run a few lines of Python before the exec. `clone3` creates the
child inside its cgroup; a later move would wait for the kernel's RCU (7 ms measured) and might miss the child's first
children. If the supervisor has more threads, or `clone3` cannot do this, `sh` and util-linux's `setpriv` do the same
a little slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdctl.host import program
from pdctl.net.identity import CERTIFICATES_ENV
from pdctl.net.keeping import TAKEOVER_ENV
from pdctl.plan import ProcessSpec
from pdctl.wire import EPOCH_ENV, LISTEN_FD_ENV, SECRET_ENV, UNIT_ENV

_SHIM = Path(__file__).with_name("spawn_shim.py")
# $0: the supervisor's pid; $1: cgroup.procs or "". If the supervisor died before this line, the child exits.
_JOIN = '[ "$PPID" = "$0" ] || exit 1; if [ -n "$1" ]; then echo 0 >"$1"; fi; shift; '
# $0: the file for the exit code; $1: cgroup.procs or "". The leader writes its own pid.
_RECORD = (
    'if [ -n "$1" ]; then echo 0 >"$1"; fi; shift; '
    """{die} sh -c 'echo $$ >"$0.pid"; exec "$@"' "$0" "$@"; """
    'code=$?; echo $code >"$0.new"; mv "$0.new" "$0"; exit $code'
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CLONE_INTO_CGROUP = 0x200000000  # linux/sched.h
_SYS_CLONE3 = 435  # the same on all architectures
# struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack and its size, tls, set_tid and its size,
# cgroup.
_CLONE_ARGS = struct.Struct("11Q")

# PyDLL keeps the interpreter's lock: no other code of the supervisor runs between clone and exec.
_libc = ctypes.PyDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a process. `record`: the file for its exit code and, beside it, its pid; None if it must not outlive
    the supervisor. `takeover`: a proxy's channel to its keeper, and its journal."""

    spec: ProcessSpec
    env: dict[str, str]
    stamp: str
    epoch: str
    listen_fd: int | None
    join: Path | None
    record: Path | None
    takeover: tuple[int, int] | None = None

    @property
    def inherited(self) -> tuple[int, ...]:
        """Descriptors that the process gets."""
        return (*(() if self.listen_fd is None else (self.listen_fd,)), *(self.takeover or ()))


def raise_limits() -> None:
    """Raise the limits of open files and locked memory to their maximum. Children inherit them; RDMA pins memory."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))


def write_files(spec: ProcessSpec) -> None:
    """Write the files that the process reads. Raises OSError."""
    for name, text in spec.files.items():
        path = Path(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(text)


def spawn(start: Start, log: int) -> int:
    """Start the process with its output in descriptor `log`. Returns its pid. Raises OSError.

    Call it in the main thread only: the kernel sends the death signal when the parent thread ends.
    """
    env = _environment(start)
    if _found(start.spec.argv[0], env.get("PATH", "")) is None:
        raise FileNotFoundError(f"{start.spec.argv[0]} does not exist or cannot be executed")
    with _on_cpus(start.spec.cpus):
        pid = _forked(start, env, log) if _is_alone() else None
        return pid if pid is not None else _through_shell(start, env, log)


def _environment(start: Start) -> dict[str, str]:
    spec, command = start.spec, Path(start.spec.argv[0])
    inherited = dict(os.environ)
    if command.is_absolute() and command.name.startswith("python") and command != Path(program.executable()):
        # An engine with an environment of its own must not import pdctl's packages, and needs the tools beside its
        # interpreter (compilers of kernels look for ninja in PATH).
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            inherited.pop(name, None)
        inherited["PATH"] = f"{command.parent}:{inherited.get('PATH', os.defpath)}"
    inherited.pop(CERTIFICATES_ENV, None)  # which processes have an identity is for the plan to say
    env = {**inherited, **spec.env, **start.env, EPOCH_ENV: start.epoch, "PYTHONUNBUFFERED": "1"}
    env[UNIT_ENV] = start.stamp.partition("=")[2]
    if not spec.is_ours:
        del env[SECRET_ENV]
    if spec.api_key_env:
        env[spec.api_key_env] = start.env[SECRET_ENV]
    if start.listen_fd is not None:
        env[LISTEN_FD_ENV] = str(start.listen_fd)
    if start.takeover is not None:
        env[TAKEOVER_ENV] = ",".join(map(str, (*start.takeover, spec.slots)))
    return env


# -- by ourselves ------------------------------------------------------------------------------------------


def _forked(start: Start, env: dict[str, str], log: int) -> int | None:
    """The pid; None if the kernel or a sandbox does not allow creating a child inside a cgroup."""
    command = _recorded(start, "") if start.record is not None else list(start.spec.argv)
    path = _found(command[0], env.get("PATH", ""))
    assert path is not None
    parent, failed = os.getpid(), os.pipe2(os.O_CLOEXEC)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pid = _fork(start.join)
        if pid == 0:
            _become(start, path, command, env, parent, (nothing, log, failed[1]))
        os.close(failed[1])
        code = b"" if pid is None else os.read(failed[0], 16)
    finally:
        os.close(nothing)
        os.close(failed[0])
        if pid is None:
            os.close(failed[1])
    if code:
        assert pid is not None
        os.waitpid(pid, 0)
        raise OSError(int(code), f"{path} cannot be executed: {os.strerror(int(code))}")
    return pid


def _fork(join: Path | None) -> int | None:
    if join is None:
        return os.fork()
    group = os.open(join.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fields = [0] * 11
        fields[0], fields[4], fields[10] = _CLONE_INTO_CGROUP, int(signal.SIGCHLD), group
        arguments = _CLONE_ARGS.pack(*fields)
        pid: int = _libc.syscall(_SYS_CLONE3, arguments, ctypes.c_size_t(len(arguments)))
    finally:
        os.close(group)
    return pid if pid >= 0 else None


def _become(
    start: Start, path: str, command: list[str], env: dict[str, str], parent: int, files: tuple[int, int, int]
) -> None:
    """In the child: never returns."""
    nothing, log, failed = files
    try:
        os.setsid()
        for file, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(file, target)
        for descriptor in start.inherited:
            os.set_inheritable(descriptor, True)
        # Python ignores these two signals, and ignored signals stay ignored after exec.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        if start.record is None:
            _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)
        os.execve(path, command, env)  # noqa: S606 - becoming the command is the point
    except OSError as failure:
        os.write(failed, str(failure.errno).encode())
    finally:
        os._exit(127)


def _is_alone() -> bool:
    """Whether this process has one thread. A fork of a process with several may hold locks that are never released."""
    return len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208 - names are all that is needed


# -- through a shell ---------------------------------------------------------------------------------------


def _through_shell(start: Start, env: dict[str, str], log: int) -> int:
    process = subprocess.Popen(
        _argv(start), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        pass_fds=start.inherited,
    )  # fmt: skip
    # The supervisor waits for the pid itself, as for all children.
    process.returncode = 0
    return process.pid


def _argv(start: Start) -> list[str]:
    command, join = list(start.spec.argv), str(start.join or "")
    if start.record is not None:
        return _recorded(start, join)
    setpriv = _found("setpriv", os.environ.get("PATH", ""))
    if setpriv is None:
        return program.spawn_shim(_SHIM, str(os.getpid()), join, *command)
    return ["/bin/sh", "-c", f'{_JOIN} exec {setpriv} --pdeathsig TERM -- "$@"', str(os.getpid()), join, *command]


def _recorded(start: Start, join: str) -> list[str]:
    """Run the command below a shell that records its exit code; if the shell dies, so does the command."""
    setpriv = _found("setpriv", os.environ.get("PATH", ""))
    die = f"{setpriv} --pdeathsig KILL --" if setpriv else ""
    return ["/bin/sh", "-c", _RECORD.format(die=die), str(start.record), join, *start.spec.argv]


_known: dict[tuple[str, str], str] = {}


def _found(command: str, path: str) -> str | None:
    """The path of a command. A miss is not cached: the command may be installed later."""
    found = _known.get((command, path)) or shutil.which(command, path=path)
    if found is not None:
        _known[command, path] = found
    return found


@contextlib.contextmanager
def _on_cpus(cpus: tuple[int, ...]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    if not cpus or set(cpus) == before:
        yield
        return
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
