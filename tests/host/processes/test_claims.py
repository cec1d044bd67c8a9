"""Claims on ports: one service at a time, free again when the holder is gone."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pdctl.host.processes.claims import PortClaims, claimed_ports

HOLDER = """
import sys
from pdctl.host.processes.claims import PortClaims
claims = PortClaims()
print(claims.claim([int(sys.argv[1])]), flush=True)
sys.stdin.read()
"""


def test_all_or_none_and_each_once() -> None:
    ours, theirs = PortClaims(), PortClaims()
    assert ours.claim([71001, 71002]) == []
    assert ours.claim([71002, 71003]) == []  # what it has, it may ask for again
    assert theirs.claim([71004, 71003, 71005]) == [71003]
    assert claimed_ports() >= {71001, 71002, 71003}
    assert not claimed_ports() & {71004, 71005}
    ours.keep({71002, 71006})
    theirs.keep({71002, 71001})  # one of them is held
    assert theirs.claim([71001, 71003]) == []
    assert theirs.claim([71006]) == [71006]
    ours.close()
    theirs.close()
    assert not claimed_ports() & set(range(71001, 71007))


def test_a_killed_holder_holds_nothing() -> None:
    words = [sys.executable, "-c", HOLDER, "71010"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "[]\n"
        ours = PortClaims()
        assert 71010 in claimed_ports()
        assert ours.claim([71010]) == [71010]
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
    assert ours.claim([71010]) == []
    ours.close()


def test_a_kernel_that_shows_no_sockets(tmp_path: Path) -> None:
    assert claimed_ports(tmp_path) == frozenset()
    (tmp_path / "net").mkdir()
    lines = ["Num       RefCount Protocol Flags    Type St Inode Path", "0: 2 0 0 2 1 51 @pdctl-port-18100"]
    lines += ["0: 2 0 0 2 1 52 @pdctl-port-x", "0: 2 0 0 2 1 53 /run/pdctl-port-18101", "0: 2 0 0 2 1 54"]
    (tmp_path / "net" / "unix").write_text("\n".join(lines) + "\n")
    assert claimed_ports(tmp_path) == {18100}


@pytest.mark.parametrize("call", ["socket", "bind"])
def test_what_cannot_be_claimed_is_not_taken_by_another(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A supervisor without a free descriptor starts its processes all the same."""

    class Refused(socket.socket):
        def __init__(self, *words: int) -> None:
            if call == "socket":
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            super().__init__(*words)

        def bind(self, address: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", Refused)
        ours = PortClaims()
        assert ours.claim([71020, 71021]) == []
        ours.keep({71021})
    assert not claimed_ports() & {71020, 71021}
    theirs = PortClaims()
    assert theirs.claim([71020, 71021]) == []
    ours.close()
    assert claimed_ports() >= {71020, 71021}
    theirs.close()
