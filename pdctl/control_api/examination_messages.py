"""What `pdctl doctor` asks the nodes of a cluster, and what they answer."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from pdctl.control_api.meanings import says

# A transfer between two nodes measures in the memory of both.
MOST_MIB = 4096
FarTransport = Literal["mooncake", "nixl"]
TransferProtocol = Literal["auto", "tcp", "rdma"]


class ExamineOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Each node is to inspect itself, for the topology in `text` if there is one."""

    text: Annotated[str, says("the topology, empty for none")] = ""
    source: Annotated[str, says("the file that it came from")] = ""


class NodeFinding(msgspec.Struct, frozen=True, kw_only=True):
    """A finding of `pdctl doctor` on a node."""

    id: Annotated[str, says("the check")]
    severity: Annotated[str, says("`critical`, `warning`, `unknown`, `info`, `ok`")]
    subject: Annotated[str, says("what it is about")]
    observed: Annotated[str, says("what was observed")]
    expected: Annotated[str, says("what was expected; may be empty")] = ""
    evidence: Annotated[str, says("where it was read; may be empty")] = ""
    cause: Annotated[str, says("what it means; may be empty")] = ""
    fix: Annotated[str, says("how to mend it; may be empty")] = ""
    reference: Annotated[str, says("the source; may be empty")] = ""


class RdmaPort(msgspec.Struct, frozen=True, kw_only=True):
    """An RDMA port that is up, as other nodes must have it, too."""

    link_layer: Annotated[str, says("`InfiniBand` or `Ethernet`")]
    mtu: Annotated[int, says("of the network interface behind it; 0 if unknown")] = 0
    gid_index: Annotated[int | None, says("the first RoCE v2 GID with an IPv4 address; null if there is none")] = None


class NodeTraits(msgspec.Struct, frozen=True, kw_only=True):
    """What should be the same on all nodes. Empty: it is not there."""

    pdctl: Annotated[str, says("version of pdctl")]
    kernel: Annotated[str, says("release of the kernel")]
    driver: Annotated[str, says("version of NVIDIA's kernel module")] = ""
    ofed: Annotated[str, says("version of NVIDIA's network drivers, if they are not the kernel's own")] = ""
    mtu: Annotated[int, says("of the interface that the node listens on; 0 if unknown")] = 0
    packages: Annotated[dict[str, str], says("versions of the engines' packages, by name")] = {}
    rdma: Annotated[dict[str, RdmaPort], says("RDMA ports that are up, by name")] = {}


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a node found on itself."""

    findings: Annotated[tuple[NodeFinding, ...], says("the findings")]
    traits: Annotated[NodeTraits, says("what is compared with other nodes")]


class NodeExamination(msgspec.Struct, frozen=True, kw_only=True):
    """A node's report, or why there is none."""

    node: Annotated[str, says("its name")]
    report: Annotated[NodeReport | None, says("null if it has none")] = None
    reason: Annotated[str, says("why it has none, else empty")] = ""
    clock_s: Annotated[float | None, says("seconds by which its clock is ahead of the asked node's")] = None
    clock_error_s: Annotated[float, says("largest error of that")] = 0.0


class ClusterExamination(msgspec.Struct, frozen=True, kw_only=True):
    """The reports of all nodes."""

    nodes: Annotated[tuple[NodeExamination, ...], says("by name")]


class Clock(msgspec.Struct, frozen=True):
    """A node's wall clock, seconds since 1970."""

    at: float


class ServeOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A node is to serve known bytes for a moment."""

    transport: Annotated[FarTransport, says("one that crosses hosts")]
    protocol: Annotated[TransferProtocol, says("`auto`: RDMA if both have it")] = "auto"
    mib: Annotated[int, msgspec.Meta(description="size of the transfer", ge=1, le=MOST_MIB)] = 64


class ReadOrder(ServeOrder, frozen=True, kw_only=True):
    """A node is to read the bytes at `address`, and to time that."""

    address: Annotated[str, msgspec.Meta(max_length=65536)]


class TransferOrder(ServeOrder, frozen=True, kw_only=True):
    """A node is to read bytes that another one serves, and to time that."""

    serving: Annotated[str, msgspec.Meta(description="the node whose memory is read", max_length=64)]
    reading: Annotated[str, msgspec.Meta(description="the node that reads", max_length=64)]


class TransferResult(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a transport moves bytes between two nodes; or `error`."""

    transport: Annotated[str, says("the transport")]
    error: Annotated[str, says("why it could not be measured, else empty")] = ""
    protocol: Annotated[str, says("the protocol that was used")] = ""
    fallback: Annotated[str, says("why that is not the wanted one, else empty")] = ""
    bytes_right: Annotated[bool, says("whether every byte arrived as it was")] = False
    mib: Annotated[int, says("size of the transfer")] = 0
    gbps: Annotated[float, says("GB/s in one piece")] = 0.0
    of_copy: Annotated[float, says("relative to a memory copy of the same bytes")] = 0.0
    blocks: Annotated[int, says("number of pieces of 64 KiB")] = 0
    blocks_gbps: Annotated[float, says("GB/s in these pieces")] = 0.0
    blocks_of_copy: Annotated[float, says("relative to a memory copy of these pieces")] = 0.0
    latency_us: Annotated[float, says("of 64 bytes, microseconds")] = 0.0
