"""Metrics of the service's processes and links, from the supervisor's status, and of the machine's RDMA ports.

docs/metrics.md lists every name.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pdctl.host.devices.rdma import Port, RdmaTree

# The kernel counts words of four bytes.
_WORD_BYTES = 4
# States in which a process does its work.
_UP = ("ready", "draining", "drained")
# Counters of a port that tell of errors, or of congestion. The kernel's names.
RDMA_EVENTS = (
    "symbol_error", "link_downed", "link_error_recovery", "local_link_integrity_errors",
    "excessive_buffer_overrun_errors", "port_rcv_errors", "port_xmit_discards", "port_xmit_wait", "out_of_sequence",
    "packet_seq_err", "implied_nak_seq_err", "duplicate_request", "local_ack_timeout_err", "rnr_nak_retry_err",
    "req_transport_retries_exceeded", "req_rnr_retries_exceeded", "roce_slow_restart", "np_cnp_sent", "rp_cnp_handled",
)  # fmt: skip


class Process(msgspec.Struct, frozen=True):
    """The fields of a process's status that become metrics."""

    name: str
    kind: str
    role: str
    group: str
    state: str
    restarts: int


class Link(msgspec.Struct, frozen=True):
    """The fields of a link's status that become metrics."""

    reader: str
    peer: str
    transport: str
    protocol: str
    fallback: str
    pulls: int
    bytes: int
    gbps: float


class Status(msgspec.Struct, frozen=True):
    """The part of the supervisor's status that becomes metrics. Its other fields are not read."""

    state: str
    processes: list[Process]
    links: list[Link]


def of_status(status: Status) -> Iterator[Metric]:
    """Processes and links."""
    yield GaugeMetricFamily(
        "pdctl_service_ready", "1 if every process of the service is ready", value=float(status.state == "ready")
    )
    yield from _processes(status.processes)
    yield from _links(status.links)


def _processes(processes: list[Process]) -> Iterator[Metric]:
    labels = ["process", "group", "kind", "role"]
    up = GaugeMetricFamily("pdctl_process_up", "1 if the process is ready, or is drained", labels=labels)
    state = GaugeMetricFamily("pdctl_process_state", "1: the process is in this state", labels=["process", "state"])
    restarts = CounterMetricFamily("pdctl_process_restarts", "Starts after the first", labels=["process"])
    for process in processes:
        up.add_metric([process.name, process.group, process.kind, process.role], float(process.state in _UP))
        state.add_metric([process.name, process.state], 1.0)
        restarts.add_metric([process.name], process.restarts)
    yield from (up, state, restarts)


def _links(links: list[Link]) -> Iterator[Metric]:
    pair = ["prefill", "decode"]
    up = GaugeMetricFamily(
        "pdctl_link_up", "1 if KV can move between two engines, and how", labels=[*pair, "transport", "protocol"]
    )
    fallback = GaugeMetricFamily(
        "pdctl_link_fallback", "1 if another protocol than the configured one carries the KV", labels=pair
    )
    speed = GaugeMetricFamily(
        "pdctl_link_bytes_per_second", "Speed of the last 16 transfers; 0 before the first", labels=pair
    )
    pulls = CounterMetricFamily("pdctl_link_transfers", "Transfers of KV", labels=pair)
    moved = CounterMetricFamily("pdctl_link_bytes", "Bytes of KV moved", labels=pair)
    for link in links:
        names = [link.peer, link.reader]
        up.add_metric([*names, link.transport, link.protocol], float(bool(link.transport)))
        fallback.add_metric(names, float(bool(link.fallback)))
        speed.add_metric(names, link.gbps * 1e9)
        pulls.add_metric(names, link.pulls)
        moved.add_metric(names, link.bytes)
    yield from (up, fallback, speed, pulls, moved)


def of_ports(tree: RdmaTree) -> Iterator[Metric]:
    """RDMA ports: state, rate, traffic and errors."""
    labels = ["device", "port"]
    active = GaugeMetricFamily("pdctl_rdma_port_active", "1 if the port is ACTIVE", labels=labels)
    rate = GaugeMetricFamily("pdctl_rdma_port_bytes_per_second", "The port's nominal rate", labels=labels)
    received = CounterMetricFamily("pdctl_rdma_received_bytes", "Bytes received by the port", labels=labels)
    sent = CounterMetricFamily("pdctl_rdma_sent_bytes", "Bytes sent by the port", labels=labels)
    events = CounterMetricFamily(
        "pdctl_rdma_events", "Errors and congestion, by the kernel's counter", labels=[*labels, "counter"]
    )
    for port in (port for device in tree.devices for port in device.ports):
        names = [port.device, str(port.number)]
        active.add_metric(names, float(port.state == "ACTIVE"))
        if port.rate is not None:
            rate.add_metric(names, port.rate.gbps * 1e9 / 8)
        for family, counter in ((received, "port_rcv_data"), (sent, "port_xmit_data")):
            if counter in port.counters:
                family.add_metric(names, port.counters[counter] * _WORD_BYTES)
        for counter, value in _events(port):
            events.add_metric([*names, counter], value)
    yield from (active, rate, received, sent, events)


def _events(port: Port) -> Iterator[tuple[str, int]]:
    known = {**port.hw_counters, **port.counters}
    return ((name, known[name]) for name in RDMA_EVENTS if name in known)
