"""A service on three hosts: commands from every node, and some faults under 16 streams. `scripts/try-hosts` tries all
of them, several times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts.lab import reason_to_skip
from tests.hosts.run import CHECKS, trial
from tests.hosts.trial import FREED_UNDER_LOAD_S, Report, Trial
from tests.registry import etcd

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
    pytest.mark.skipif(etcd.BINARY is None, reason="etcd is not installed"),
]


@pytest.fixture(scope="module")
def service() -> Iterator[Trial]:
    report = Report()
    with trial(report, freed_s=FREED_UNDER_LOAD_S) as found:
        yield found
        found.check_trace()
    assert not report.broken


@pytest.mark.parametrize("name", ["look", "engine", "agent", "quorum", "cut", "power"])
def test_every_promise_holds(service: Trial, name: str) -> None:
    CHECKS[name](service)
    assert not service.report.broken
