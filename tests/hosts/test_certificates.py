"""A service on three hosts with certificates: it works as without them, and nobody else reaches any part of it."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from functools import partial

import httpx
import pytest

from tests.hosts.cluster import CERTIFICATES, get
from tests.hosts.lab import reason_to_skip
from tests.hosts.run import CHECKS, trial
from tests.hosts.trial import Report, Trial
from tests.registry import etcd
from tests.service import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
    pytest.mark.skipif(etcd.BINARY is None, reason="etcd is not installed"),
]
AGENT_PORT = 18090


@pytest.fixture(scope="module")
def service() -> Iterator[Trial]:
    report = Report()
    with trial(report, certificates=True) as found:
        yield found
        found.check_trace()
    assert not report.broken


@pytest.mark.parametrize("name", ["look", "engine"])
def test_every_promise_holds(service: Trial, name: str) -> None:
    CHECKS[name](service)
    assert not service.report.broken


def test_without_a_certificate_nobody_reaches_anything_even_with_the_secret(service: Trial) -> None:
    cluster = service.cluster
    places = {(entry.host, entry.port) for entry in cluster.entries().values()}
    assert len(places) == 7, "four engines and three proxies"
    places |= {(node.host.address, AGENT_PORT) for node in cluster.nodes.values()}
    for host, port in places:
        for scheme in ("http", "https"):
            with pytest.raises(httpx.TransportError):
                cluster.lab.ask(get, f"{scheme}://{host}:{port}/health", 5.0)
        # With one it answers; an agent knows no such path.
        assert cluster.get(host, port, "/health").status_code in (200, 404)


def test_certificates_are_renewed_while_streams_run(service: Trial) -> None:
    cluster = service.cluster
    entry = cluster.engines()["prefill-a-0"]
    tls = cluster.tls
    assert tls is not None

    def shown() -> str:
        return cluster.lab.ask(partial(ssl.get_server_certificate, (entry.host, entry.port), timeout=5.0))

    with service.streams() as streams:
        cluster.certify()
        renewed = (cluster.nodes[entry.node].folder / CERTIFICATES / "node.pem").read_text()
        wait_until(lambda: shown().strip() == renewed.strip(), 30, "the new certificate to be shown")
        service.go_on(streams, cluster.nodes)
    service.judge("certificates renewed", streams)
    assert not service.report.broken
