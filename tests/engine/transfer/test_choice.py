from __future__ import annotations

import pytest

from pdctl.engine.transfer.choice import choose
from pdctl.wire import Manifest, PoolEndpoint, Served

ALL = {"cuda_ipc": "cuda_ipc", "shm": "shm", "mooncake": "tcp", "nixl": "sm+tcp"}


def peer(*served: Served, host: str = "here") -> PoolEndpoint:
    return PoolEndpoint(host, list(served), 8, Manifest("m", "float32", 16, []))


IPC = Served("cuda_ipc", "d", "cuda_ipc")
SHM, MC, NIXL = Served("shm", "a", "shm"), Served("mooncake", "b", "tcp"), Served("nixl", "c", "sm+tcp")


@pytest.mark.parametrize(
    ("served", "host", "wanted"),
    [
        ((SHM, MC, NIXL), "here", "shm"),
        ((SHM, IPC), "here", "cuda_ipc"),
        ((IPC, MC), "there", "mooncake"),
        ((MC, NIXL), "here", "nixl"),
        ((MC,), "here", "mooncake"),
        ((SHM, MC, NIXL), "there", "mooncake"),
        ((SHM, NIXL), "there", "nixl"),
    ],
)
def test_auto_picks_by_where_the_peer_is_and_what_both_have(served: tuple[Served, ...], host: str, wanted: str) -> None:
    chosen = choose("auto", "here", ALL, {}, peer(*served, host=host))
    assert chosen.transport == wanted
    assert ("this host" if host == "here" else "another host") in chosen.reason


@pytest.mark.parametrize(
    ("backend", "ours", "served", "host", "reason"),
    [
        ("shm", ALL, (SHM, MC), "there", "shm reaches this host only"),
        ("auto", {"shm": "shm"}, (SHM,), "there", "no transport is open on both sides"),
        ("nixl", ALL, (SHM, MC), "here", "nixl is not open on both sides"),
        ("auto", ALL, (), "here", "there none"),
    ],
)
def test_nothing_in_common_is_said(
    backend: str, ours: dict[str, str], served: tuple[Served, ...], host: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        choose(backend, "here", ours, {}, peer(*served, host=host))


def test_a_fallback_on_either_side_is_carried_along() -> None:
    asked = "RDMA is configured, but no RDMA device is active on this machine"
    assert choose("mooncake", "here", ALL, {"mooncake": asked}, peer(MC)).fallback == asked
    theirs = Served("mooncake", "b", "tcp", asked)
    assert choose("mooncake", "here", ALL, {}, peer(theirs)).fallback == asked
    half = choose("mooncake", "x", {"mooncake": "rdma"}, {}, peer(MC))
    assert half.protocol == "tcp"
    assert half.fallback == "one side has RDMA and the other has not"
    both = choose("mooncake", "x", {"mooncake": "rdma"}, {}, peer(Served("mooncake", "b", "rdma")))
    assert (both.protocol, both.fallback) == ("rdma", "")


def test_what_only_one_host_has_is_not_said_of_two() -> None:
    assert choose("auto", "here", ALL, {}, peer(NIXL, host="there")).protocol == "tcp"
    assert choose("auto", "here", ALL, {}, peer(NIXL)).protocol == "sm+tcp"
