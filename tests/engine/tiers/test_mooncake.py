"""The store's client over a real master: blocks that come back, and everything that may go wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pdctl.engine.tiers import Rows, TierFailed, TierRefused, store_kind
from pdctl.engine.tiers.mooncake import CONFIG_ENV, Config, MooncakeTier, _setup, open_store
from pdctl.engine.tiers.sealed import Sealed
from tests.service import free_port, wait_until

pytestmark = pytest.mark.skipif(find_spec("mooncake") is None, reason="needs the Mooncake package")

SIZE = 50_000


class Master:
    """A mooncake_master, and the file that engines read."""

    def __init__(self, folder: Path) -> None:
        self.rpc, self.metrics = free_port(), free_port()
        config = {
            "metadata_server": "P2PHANDSHAKE", "master_server_address": f"127.0.0.1:{self.rpc}", "protocol": "tcp",
            "device_name": "", "global_segment_size": 16 << 20, "local_buffer_size": 16 << 20,
        }  # fmt: skip
        self.config = folder / "mooncake.json"
        self.config.write_text(json.dumps(config))
        self.start()

    def start(self) -> None:
        argv = [
            sys.executable, "-m", "mooncake.cli", "--rpc_address=127.0.0.1", f"--rpc_port={self.rpc}",
            f"--metrics_port={self.metrics}", "--default_kv_lease_ttl=100",
        ]  # fmt: skip
        self.process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        wait_until(self._answers, what="the store answers")

    def _answers(self) -> bool:
        try:
            url = f"http://127.0.0.1:{self.metrics}/health"
            return httpx.get(url, timeout=1, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def store_master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    found = Master(tmp_path_factory.mktemp("store"))
    yield found
    found.kill()


def opened(master: Master, prefix: str = "t-", secret: str = "s") -> MooncakeTier:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CONFIG_ENV, str(master.config))
        tier = open_store(prefix, secret, SIZE)
    wait_until(lambda: tier.is_there, what="the client is connected")
    return tier


@pytest.fixture(scope="module")
def tier(store_master: Master) -> Iterator[MooncakeTier]:
    found = opened(store_master)
    yield found
    closed(found)


def closed(tier: MooncakeTier) -> None:
    """With the client, which an engine leaves to the end of its process."""
    tier.close()
    tier._client.close()


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def rows(*numbers: int) -> Rows:
    return np.stack([np.full(SIZE, number % 256, np.uint8) for number in numbers])


def put(tier: MooncakeTier, *numbers: int) -> None:
    tier.put([name(number) for number in numbers], rows(*numbers), [""] * len(numbers))


def test_blocks_come_back_up_to_the_first_that_is_missing(tier: MooncakeTier) -> None:
    put(tier, 1, 2, 4)
    assert tier.leading([name(n) for n in (1, 2, 3, 4)]) == 2
    assert tier.missing([name(n) for n in (1, 2, 3, 4)]) == [False, False, True, False]
    assert (tier.get([name(n) for n in (1, 2, 3, 4)]) == rows(1, 2)).all()
    assert len(tier.get([name(3)])) == 0


def test_another_engine_reads_them_if_it_is_of_the_same_service(store_master: Master, tier: MooncakeTier) -> None:
    put(tier, 11)
    friend, stranger = opened(store_master), opened(store_master, secret="another")
    other = opened(store_master, prefix="u-")
    assert (friend.get([name(11)]) == rows(11)).all()
    assert other.leading([name(11)]) == 0
    assert len(stranger.get([name(11)])) == 0
    assert stranger.counts.wrong == 1
    for one in (friend, stranger, other):
        closed(one)


@pytest.mark.parametrize("how", ["a changed byte", "cut", "another block", "rubbish"])
def test_a_value_that_is_not_the_block_is_removed_and_can_be_put_again(tier: MooncakeTier, how: str) -> None:
    number = 100 + len(how)
    put(tier, number, number + 50)
    key, client = tier._key(name(number)), tier._client
    good = client.get(key)
    bad = {
        "a changed byte": good[:-1] + bytes([good[-1] ^ 1]),
        "cut": good[:-1],
        "another block": client.get(tier._key(name(number + 50))),
        "rubbish": b"rubbish",
    }[how]
    client.remove(key, True)
    assert client.put(key, bad) == 0
    wrong = tier.counts.wrong
    assert len(tier.get([name(number)])) == 0
    assert tier.counts.wrong == wrong + 1
    assert tier.missing([name(number)]) == [True]
    put(tier, number)
    assert (tier.get([name(number)]) == rows(number)).all()


def test_a_full_store_refuses(tier: MooncakeTier) -> None:
    keys = [f"filler-{number}" for number in range(200)]
    assert any(tier._client.put(key, bytes(1 << 20)) != 0 for key in keys)
    refused = tier.counts.refused

    def fills() -> bool:
        try:
            put(tier, *range(1000, 1064))
        except TierFailed:
            return True
        return False

    try:
        wait_until(fills, what="no room for 3 MB")
        assert tier.counts.refused >= refused + 64
    finally:
        tier._client.remove_by_regex("filler-.*", True)


def test_a_dead_store_fails_and_is_used_again_when_it_is_back(store_master: Master) -> None:
    master = store_master
    found = opened(master, "d-")
    put(found, 1)
    master.kill()

    def fails() -> bool:
        try:
            found.leading([name(1)])
        except TierFailed:
            return True
        return False

    wait_until(fails, what="questions fail")
    assert not found.is_there, "it is left alone for a while"
    with pytest.raises(TierFailed):
        put(found, 2)
    master.start()

    def works() -> bool:
        try:
            put(found, 3)
            return found.leading([name(3)]) == 1
        except TierFailed:
            return False

    wait_until(works, what="it is used again")
    closed(found)


def test_a_frozen_store_does_not_hold_up(store_master: Master) -> None:
    master = store_master
    found = opened(master, "f-")
    put(found, 1)
    master.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(TierFailed):
            found.leading([name(1)])
        with pytest.raises(TierFailed, match="just now"):
            found.leading([name(1)])
    finally:
        master.process.send_signal(signal.SIGCONT)
    wait_until(lambda: found.is_there and found.leading([name(1)]) == 1, what="it is used again")
    closed(found)


class Throwing:
    """A client whose library throws, as pybind11 passes it on."""

    def __getattr__(self, name: str) -> Any:
        def throw(*_: object) -> None:
            raise RuntimeError(f"{name}: bad things happened")

        return throw


def test_what_the_library_throws_ends_no_engine() -> None:
    """An exception in a thread of the tier would: see lifeline.vital."""
    found = MooncakeTier("t-", Sealed("s", SIZE), SIZE, Throwing())
    found._is_set_up.set()
    for call in (lambda: found.leading([name(1)]), lambda: put(found, 1)):
        with pytest.raises(TierFailed, match="bad things"):
            call()
    assert _setup(Throwing(), Config("m", "a", "tcp", "", 1, 1), "h") == -1
    found.close()


def test_a_store_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TierRefused, match="lmcache"):
        store_kind("lmcache")
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    with pytest.raises(TierRefused, match=CONFIG_ENV):
        open_store("t-", "s", SIZE)
    for content in (None, "{", "{}", '{"metadata_server": 7}'):
        path = tmp_path / "store.json"
        if content is not None:
            path.write_text(content)
        monkeypatch.setenv(CONFIG_ENV, str(path))
        with pytest.raises(TierRefused, match="cannot be used"):
            open_store("t-", "s", SIZE)
