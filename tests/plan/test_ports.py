from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.errors import PdctlError
from pdctl.plan.ports import PortSearch, free_ports

PURPOSES = ("http", "side-channel", "side-channel-1", "side-channel-2", "internal")


@given(st.sets(st.integers(20000, 20030), max_size=20), st.sampled_from([(), (20000, 20040)]))
def test_ports_are_free_and_those_of_one_purpose_consecutive(taken: set[int], allowed: tuple[int, ...]) -> None:
    before = set(taken)
    found = free_ports(PURPOSES, {}, taken, PortSearch(Path("/r"), allowed))
    assert tuple(found) == PURPOSES
    assert len(set(found.values())) == len(PURPOSES)
    assert before.isdisjoint(found.values())
    assert taken == before | set(found.values())
    first = found["side-channel"]
    assert (found["side-channel-1"], found["side-channel-2"]) == (first + 1, first + 2)
    assert not allowed or all(allowed[0] <= port <= allowed[1] for port in found.values())


def test_a_process_keeps_its_ports() -> None:
    taken = {18100, 18101, 18102}
    before = {"http": 18100, "side-channel": 18101, "side-channel-1": 18102}
    search = PortSearch(Path("/r"), ())
    assert free_ports(("http", "side-channel", "side-channel-1"), before, taken, search) == before
    more = free_ports(PURPOSES, before, taken, search)
    assert more["http"] == 18100
    assert more["side-channel-2"] == more["side-channel"] + 2, "a longer run has to move"


def test_no_free_ports_say_so() -> None:
    with pytest.raises(PdctlError, match="no 3 consecutive free ports from 20000 to 20004") as failure:
        free_ports(PURPOSES[1:4], {}, {20001, 20003}, PortSearch(Path("/r"), (20000, 20004)))
    assert failure.value.hint == "widen service.engine_ports"
