"""Builtin engines share a real Mooncake Store, which is killed, frozen, filled and corrupted: tokens stay right."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.test_prefix import cached, tokens
from tests.service import Run, Service, pid_of, running, topology, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_spec("mooncake") is None, reason="needs the Mooncake package"),
]
STORE = """
[[stores]]
name = "kv"
kind = "mooncake"
segment_gb = 0.015625
buffer_gb = 0.015625
args = ["--default_kv_lease_ttl=200"]
"""
ENGINES = ("prefill-0", "prefill-1", "decode-0")
LENGTH = 200
FULL = LENGTH // 16 * 16


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    # Nothing is fetched from peers: they do not follow each other before a first change, and a pool is small.
    extra = 'store = "kv"\nfetch_prefixes = true'
    text = topology(prefills=2, extra='routing = "round_robin"', kv_cache_gb=0.0016, engine_extra=extra) + STORE
    # A frozen store is replaced after three probes.
    text = text.replace("grace_s = 10", "grace_s = 10\nliveness_s = 0.5")
    with running(module_run, text) as found:
        wait_until(lambda: is_used(found), what="all engines use the store")
        yield found


def is_used(service: Service) -> bool:
    """By all engines. One that has computed nothing yet does not say so."""
    return all(service.engine_state(engine)["counters"].get("store_unavailable") == 0 for engine in ENGINES)


def total(service: Service, name: str) -> int:
    return sum(service.engine_state(engine)["counters"].get(name, 0) for engine in ENGINES)


def ask(service: Service, number: int, **more: Any) -> dict[str, Any]:
    return service.complete(tokens(number, LENGTH), max_tokens=4, ignore_eos=True, **more)


def expected(service: Service, numbers: range) -> dict[int, list[int]]:
    """The right answers: computed anew, each for another client."""
    return {number: ask(service, number, cache_salt=f"anew {number}")["token_ids"] for number in numbers}


def test_what_is_in_no_pool_comes_from_the_store(service: Service) -> None:
    right = expected(service, range(20))
    for number in right:
        assert ask(service, number)["token_ids"] == right[number]
    for number in range(100, 120):
        ask(service, number)  # the pools are full of others now
    wait_until(lambda: total(service, "store_stored") > 20 * FULL // 16, what="blocks in the store")
    before = total(service, "store_loaded")
    again = {number: ask(service, number) for number in right}
    assert {number: answer["token_ids"] for number, answer in again.items()} == right
    assert sum(map(cached, again.values())) > 0.5 * 20 * FULL
    assert total(service, "store_loaded") - before > 0
    service.idle()


def test_a_store_that_is_killed_or_frozen_costs_no_answer(service: Service) -> None:
    """Under load. Afterwards it is used again."""
    right = expected(service, range(30, 38))
    wrong: list[str] = []
    over, done = threading.Event(), [0] * 3

    def load(thread: int) -> None:
        while not over.is_set():
            number = 30 + (thread + done[thread]) % len(right)
            answer = ask(service, number)
            if answer["token_ids"] != right[number]:
                wrong.append(f"{number}: {answer['token_ids']}")
            ask(service, 1000 + 7 * thread + done[thread])  # others drive it out of the pools
            done[thread] += 1

    threads = [threading.Thread(target=load, args=(number,), daemon=True) for number in range(len(done))]
    for thread in threads:
        thread.start()
    try:
        for sign in (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL):
            store, before = service.process("kv"), sum(done)
            os.kill(pid_of(store), sign)
            service.restarted(store)
            wait_until(lambda before=before: sum(done) > before + 6, what="answers after the fault")
        loaded = total(service, "store_loaded")
        wait_until(lambda: total(service, "store_loaded") > loaded, what="the store is used again")
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
    assert [service.process(engine).restarts for engine in ENGINES] == [0, 0, 0]
    service.idle()


def client(service: Service) -> Any:
    """A client of the store without memory of its own."""
    store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
    address = f"127.0.0.1:{service.process('kv').ports['rpc']}"
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", address) == 0
    return store


def test_a_full_store_refuses_and_costs_no_answer(service: Service) -> None:
    right = expected(service, range(40, 44))
    filler, keys = client(service), [f"filler-{number}" for number in range(200)]
    filled = [key for key in keys if filler.put(key, bytes(1 << 20)) == 0]
    assert len(filled) < len(keys), "it is full"
    try:
        for number, found in right.items():
            assert ask(service, number)["token_ids"] == found
            assert filler.put(f"again-{number}", bytes(1 << 20)) in (0, -200)
            assert ask(service, number)["token_ids"] == found
    finally:
        filler.remove_by_regex("filler-.*|again-.*", True)
        filler.close()
    service.idle()


def corrupted(pid: int) -> int:
    """Change a byte of every block of the store that is in this process's memory; their number."""
    count, magic = 0, b"pdkv\x01\x00"
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode, *_ = line.split()
            begin, end = (int(part, 16) for part in span.split("-"))
            if not mode.startswith("rw") or end - begin < 8 << 20:
                continue
            memory.seek(begin)
            try:
                found = memory.read(end - begin)
            except OSError:
                continue
            at = found.find(magic)
            while at >= 0:
                memory.seek(begin + at + 4096)
                memory.write(bytes([found[at + 4096] ^ 0x40]))
                count += 1
                at = found.find(magic, at + 1)
    return count


def test_a_segment_that_is_corrupted_gives_no_wrong_token(service: Service) -> None:
    right = expected(service, range(50, 60))
    for number in right:
        ask(service, number)
    stored = total(service, "store_stored")
    for number in range(200, 220):
        ask(service, number)
    wait_until(lambda: total(service, "store_stored") > stored, what="blocks in the store")
    wrong = total(service, "store_wrong")
    cores = [core.pid for name in ENGINES for core in psutil.Process(pid_of(service.process(name))).children()]
    try:
        assert sum(map(corrupted, cores)) > 50
    except PermissionError:
        pytest.skip("this user may not write to another process's memory")
    assert {number: ask(service, number)["token_ids"] for number in right} == right
    assert total(service, "store_wrong") > wrong
    # What was wrong is put again, and is right.
    for number in range(220, 240):
        ask(service, number)
    loaded = total(service, "store_loaded")

    def comes_back() -> bool:
        assert {number: ask(service, number)["token_ids"] for number in right} == right
        for number in range(240, 260):
            ask(service, number)
        return total(service, "store_loaded") > loaded

    wait_until(comes_back, what="the store is used again")
    service.idle()


def test_an_engine_that_dies_takes_its_part_only(service: Service) -> None:
    right = expected(service, range(60, 68))
    for number in right:
        ask(service, number)
    victim = service.process("prefill-1")
    for core in psutil.Process(pid_of(victim)).children():
        core.kill()
    assert {number: ask(service, number)["token_ids"] for number in right} == right
    service.restarted(victim)
    wait_until(lambda: is_used(service), what="all engines use the store")
    assert {number: ask(service, number)["token_ids"] for number in right} == right
    service.idle()
