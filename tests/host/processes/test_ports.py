from __future__ import annotations

import os
import socket
from pathlib import Path

from pdctl.host.processes.ports import listening_ports


def test_a_real_listener_is_found_with_its_process() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as v6,
    ):
        found = listening_ports()
        for sock in (listener, v6):
            holder = found[sock.getsockname()[1]]
            assert holder.pid == os.getpid()
            assert "python" in holder.command


def test_connected_sockets_do_not_count() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        assert client.getsockname()[1] not in listening_ports()


def test_a_planted_tree(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    row = "   0: 0100007F:1F90 00000000:0000 {state} 00000000:00000000 00:00000000 00000000  0  0 {inode} 1\n"
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text(head + row.format(state="0A", inode=77) + row.format(state="01", inode=78))
    (tmp_path / "12/fd").mkdir(parents=True)
    (tmp_path / "12/cmdline").write_bytes(b"vllm\0serve\0")
    (tmp_path / "12/fd/3").symlink_to("socket:[77]")
    found = listening_ports(tmp_path)
    assert {port: (holder.pid, holder.command) for port, holder in found.items()} == {8080: (12, "vllm serve")}
    (tmp_path / "12/fd/3").unlink()
    assert "another user" in listening_ports(tmp_path)[8080].describe()
