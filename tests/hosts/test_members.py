"""etcd over hosts: what tests of clusters take for granted of it."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest

from tests.hosts.lab import Lab, lab, reason_to_skip
from tests.hosts.members import Member, leader, members
from tests.registry import etcd
from tests.service import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
    pytest.mark.skipif(etcd.BINARY is None, reason="etcd is not installed"),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Lab]:
    with lab("a", "b", "c") as made:
        yield made


@pytest.fixture(scope="module")
def service(hosts: Lab) -> Iterator[list[Member]]:
    with members(hosts, "a", "b", "c") as started:
        yield started


def put(hosts: Lab, member: Member, value: bytes) -> bool:
    words = {"key": base64.b64encode(b"/t/k").decode(), "value": base64.b64encode(value).decode()}
    try:
        hosts.ask(etcd.post, member.url, "/v3/kv/put", words)
    except OSError:
        return False
    return True


def test_a_write_reaches_all_members_and_counts(hosts: Lab, service: list[Member]) -> None:
    before = service[0].revision()
    assert put(hosts, service[0], b"x")
    assert [member.revision() for member in service] == [before + 1] * 3
    assert service[2].keys("/t/") == {"/t/k": b"x"}


def test_others_lead_when_the_leader_is_cut_off(hosts: Lab, service: list[Member]) -> None:
    cut = leader(service)
    others = [member for member in service if member is not cut]
    hosts.cut(cut.host.name)
    wait_until(lambda: any(member.leads() for member in others), timeout=30)
    assert wait_until(lambda: put(hosts, others[0], b"without"), timeout=30)
    assert not put(hosts, cut, b"lost"), "a leader that hears nobody wrote"
    hosts.heal()
    wait_until(lambda: put(hosts, cut, b"healed"), timeout=30)
    assert others[0].keys("/t/") == {"/t/k": b"healed"}


def test_a_member_has_its_data_when_its_host_has_power_again(hosts: Lab, service: list[Member]) -> None:
    assert put(hosts, service[1], b"before")
    hosts["b"].kill()
    wait_until(lambda: put(hosts, service[0], b"meanwhile"), timeout=30)
    hosts["b"].boot()
    service[1].start()
    service[1].until_ready()
    assert service[1].keys("/t/") == {"/t/k": b"meanwhile"}


def test_two_frozen_members_of_three_write_nothing_until_they_are_thawed(hosts: Lab, service: list[Member]) -> None:
    for member in service[1:]:
        member.freeze()
    assert not put(hosts, service[0], b"alone")
    for member in service[1:]:
        member.thaw()
    wait_until(lambda: put(hosts, service[0], b"together"), timeout=30)
