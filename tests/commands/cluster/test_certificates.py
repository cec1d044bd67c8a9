"""`pdctl cluster` as it is typed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdctl.cli import app
from pdctl.commands.cluster.authority import validity_of
from pdctl.errors import PdctlError
from pdctl.net.identity import Who, identity_in
from tests.service import CLI, free_port, wait_until

HOST = "127.0.0.1"


def said(*words: object) -> str:
    """What a verb prints on stdout. Raises PdctlError, as it is told to the user."""
    done = CliRunner().invoke(app, ["cluster", *map(str, words)], catch_exceptions=False, standalone_mode=False)
    return done.stdout.strip()


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    said("init", tmp_path / "ca", "--service", "chat")
    return tmp_path / "ca"


@pytest.fixture
def place(ca: Path) -> Iterator[str]:
    """Where machines join."""
    place = f"{HOST}:{free_port()}"
    argv = [*CLI, "cluster", "serve", str(ca), "--listen", place, "--days", "7"]
    with (ca / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        wait_until(lambda: "machines join at" in (ca / "log").read_text(), what="the server to listen")
        yield place
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_a_node_joins_and_renews(ca: Path, place: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(said("token", ca, "b", "--address", "10.0.0.2", "--address", HOST, "--hours", "0.5"))
    folder = tmp_path / "b"
    assert said("join", place, "--token-file", tmp_path / "t", "--to", folder) == "b"
    assert identity_in(str(folder)).who == Who("chat", "b")
    first = validity_of((folder / "node.pem").read_bytes())
    assert first.addresses == ("10.0.0.2", HOST)
    assert 6.9 < (first.ends - first.begins).total_seconds() / 86400 < 7.1
    said("renew", folder)
    assert validity_of((folder / "node.pem").read_bytes()) == first
    said("renew", folder, "--now")
    assert validity_of((folder / "node.pem").read_bytes()).ends >= first.ends
    with pytest.raises(PdctlError, match="refuses: this token is not known here"):
        said("join", place, "--token-file", tmp_path / "t", "--to", tmp_path / "c")


def test_files_that_are_copied_by_hand(ca: Path, tmp_path: Path) -> None:
    assert said("certify", ca, "a", "--address", "10.0.0.1") == str(ca / "a")
    said("certify", ca, "b", "--address", "10.0.0.2", "--to", tmp_path / "b", "--days", "2")
    assert (tmp_path / "b/secret").read_bytes() == (ca / "secret").read_bytes()
    said("renew", ca / "a", "--ca", ca, "--now", "--days", "3")
    renewed = validity_of((ca / "a/node.pem").read_bytes())
    assert 2.9 < (renewed.ends - renewed.begins).total_seconds() / 86400 < 3.1


def test_what_is_refused_with_a_hint(ca: Path, tmp_path: Path) -> None:
    said("certify", ca, "a", "--address", "10.0.0.1")
    for words, message in (
        (("init", ca, "--service", "chat"), "has a CA already"),
        (("init", tmp_path / "x", "--service", "a/b"), "is not a service's name"),
        (("certify", ca, "b"), "a node's certificate says its addresses"),
        (("certify", ca, "b", "--address", "host"), "host is not the address of a machine"),
        (("token", tmp_path, "b"), "cannot be read"),
        (("serve", ca, "--listen", "10.0.0.1"), "is not HOST:PORT"),
        (("serve", ca, "--listen", "0.0.0.0:18091"), "0.0.0.0 is not the address of a machine"),
        (("join", "10.0.0.1:1", "--token-file", tmp_path / "none", "--to", tmp_path), "cannot be read"),
        (("renew", ca / "a", "--now"), "does not say where this node joined"),
        (("renew", tmp_path / "none"), "cannot be read"),
    ):
        with pytest.raises(PdctlError, match=message) as failure:
            said(*words)
        assert failure.value.hint or "cannot be read" in message


def test_help_and_other_verbs_need_no_cryptography() -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from typer.testing import CliRunner; from pdctl.cli import app\n"
        "assert CliRunner().invoke(app, ['cluster', '--help']).exit_code == 0\n"
        "done = CliRunner().invoke(app, ['cluster', 'token', '/nowhere', 'b'])\n"
        "sys.exit(0 if \"pip install 'pdctl[cluster]'\" in str(done.exception.hint) else 1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
