"""Command line and environment of SGLang's server (read in sglang 0.5.23).

SGLang reads its API key only from its command line or a YAML file, so pdctl sets none: engines listen on the address
that the topology names, loopback by default. A prefill's bootstrap server never checks a key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator

from pdctl.adapters import (
    OTLP_EXPORTERS,
    Assignment,
    BaseLauncher,
    Fault,
    Installed,
    Launch,
    Package,
    different_installations,
    events_endpoints,
    option_faults,
    version_numbers,
)
from pdctl.adapters.sglang.log import FAILURES, PHASES
from pdctl.net.tracing import traces_url
from pdctl.topology.spec import Device, EngineGroup, Role, Topology

# Options that pdctl sets, and keys, which every user of the machine can read in a command line.
_OURS = (
    "--host", "--port", "--model-path", "--model", "--served-model-name", "--context-length", "--tp-size",
    "--tensor-parallel-size", "--pp-size", "--pipeline-parallel-size", "--dp-size", "--data-parallel-size", "--dtype",
    "--nccl-port", "--disaggregation-mode", "--disaggregation-transfer-backend", "--disaggregation-bootstrap-port",
    "--disaggregation-ib-device", "--disaggregation-enable-kv-checksum", "--api-key", "--admin-api-key", "--config",
    "--device", "--enable-metrics",
)  # fmt: skip
# Without a prefix cache there are no events; and a user's own subscribers need their address.
_NO_EVENTS = ("--disable-radix-cache", "--kv-events-config")
# Keys of a group that become options only if the file sets them: SGLang's own defaults depend on the device.
_OPTIONS = {
    "max_num_seqs": "--max-running-requests",
    "max_num_batched_tokens": "--chunked-prefill-size",
    "block_size": "--page-size",
    "quantization": "--quantization",
}
_OLDEST = (0, 5, 23)
# The bootstrap host for which an engine transfers no KV: its own health check uses it, too.
_NO_TRANSFER = "2.2.2.2"
_HEARTBEAT_S, _HEARTBEATS = 2, 2


class SglangLauncher(BaseLauncher):
    """See Launcher."""

    device = Device.CUDA
    settings = frozenset(
        {
            "python", "args", "tensor_parallel", "pipeline_parallel", "data_parallel", "dtype", "quantization",
            "gpu_memory_utilization", "connector", "max_num_seqs", "max_num_batched_tokens", "block_size",
        }
    )  # fmt: skip
    distributions = ("sglang",)
    connectors = ("mooncake", "nixl", "mooncake_tcp")
    phases = PHASES
    tracing = OTLP_EXPORTERS
    failures = FAILURES
    leaves_shared_memory = True

    def requirement(self, device: Device) -> str:
        """See Launcher.requirement."""
        return "sglang"

    def ports(self, group: EngineGroup) -> tuple[str, ...]:
        """See Launcher.ports. Decode engines meet at prefill's bootstrap port; ranks of one engine meet at nccl."""
        return ("bootstrap", "nccl") if group.role is Role.PREFILL else ("nccl",)

    def faults(self, topology: Topology, group: EngineGroup, package: Package) -> Iterable[Fault]:
        """See Launcher.faults."""
        name, version = package
        if version and version_numbers(version) < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            yield Fault("python", f"{name} {version} is too old for pdctl", f"install version {oldest} or later")
        yield from option_faults(group, _OURS)
        if group.role is not Role.HYBRID and not _peers(topology, group):
            message = f"no other engine can exchange KV with {group.name!r}"
            yield Fault("role", message, "SGLang engines of role prefill need one of role decode, and the reverse")

    def pair_faults(self, prefill: Installed, decode: Installed) -> Iterable[Fault]:
        """See Launcher.pair_faults."""
        yield from different_installations(prefill, decode)
        ours, other = decode.group, prefill.group
        if _connector(ours) != _connector(other):
            message = f"{ours.name!r} and {other.name!r} transfer KV by different connectors"
            yield Fault("connector", message, "set the same connector in both")
        if ours.block_size != other.block_size:
            message = f"{ours.name!r} has block_size {ours.block_size}, but {other.name!r} has {other.block_size}"
            yield Fault("block_size", message, "engines that exchange KV need the same block_size")

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """See Launcher.launch."""
        return Launch(
            argv=tuple(_argv(topology, assignment)),
            env=_env(topology, assignment),
            ready_path="/ready",
            generate_path="/v1/completions",
            generate_body=json.dumps(_one_token(assignment.group.role), separators=(",", ":")),
            ready_generates=True,
            kv_events=events_endpoints(topology, assignment, _NO_EVENTS),
        )


def _one_token(role: Role) -> dict[str, object]:
    alone: dict[str, object] = {"prompt": [1], "max_tokens": 1, "temperature": 0}
    return alone if role is Role.HYBRID else {**alone, "bootstrap_host": _NO_TRANSFER, "bootstrap_room": 1}


# -- faults ------------------------------------------------------------------------------------------------


def _peers(topology: Topology, group: EngineGroup) -> list[EngineGroup]:
    """The groups with which this one exchanges KV. An SGLang engine of role hybrid exchanges none."""
    return [
        other
        for other in topology.all_engines
        if other.kind == group.kind and {other.role, group.role} == {Role.PREFILL, Role.DECODE}
    ]


def _connector(group: EngineGroup) -> str:
    return group.connector or SglangLauncher.connectors[0]


# -- the command -------------------------------------------------------------------------------------------


def _argv(topology: Topology, assignment: Assignment) -> Iterator[str]:
    group, ports = assignment.group, assignment.ports
    yield from (
        assignment.python, "-m", "sglang.launch_server",
        "--model-path", assignment.model_path,
        "--served-model-name", topology.service.served_model_name,
        "--host", assignment.host,
        "--port", str(ports["http"]),
        "--nccl-port", str(ports["nccl"]),
        "--context-length", str(topology.service.max_model_len),
        "--dtype", group.dtype,
        "--device", group.device.value,
        "--enable-metrics",
    )  # fmt: skip
    for key, option in (
        ("tensor_parallel", "--tp-size"),
        ("pipeline_parallel", "--pp-size"),
        ("data_parallel", "--dp-size"),
    ):
        if getattr(group, key) > 1:
            yield from (option, str(getattr(group, key)))
    for key, option in _OPTIONS.items():
        if key in group.given:
            yield from (option, str(getattr(group, key)))
    if group.device is Device.CPU:
        # The only attention of SGLang that needs neither a GPU nor AMX.
        yield from ("--attention-backend", "torch_native")
    if "gpu_memory_utilization" in group.given:
        yield from ("--mem-fraction-static", f"{group.gpu_memory_utilization:g}")
    if assignment.otlp_endpoint:
        yield from ("--enable-trace", "--otlp-traces-endpoint", traces_url(assignment.otlp_endpoint))
    if group.role is not Role.HYBRID:
        yield from _disaggregation(assignment)
    if (at := events_endpoints(topology, assignment, _NO_EVENTS)) is not None:
        events = {"publisher": "zmq", "endpoint": at.events, "replay_endpoint": at.replay}
        yield from ("--kv-events-config", json.dumps(events, separators=(",", ":")))
    yield from group.args


def _disaggregation(assignment: Assignment) -> Iterator[str]:
    group = assignment.group
    yield from (
        "--disaggregation-mode", group.role.value,
        "--disaggregation-transfer-backend", _connector(group),
    )  # fmt: skip
    if group.device is Device.CUDA:
        # A request whose KV arrived damaged is aborted, not decoded. SGLang computes checksums only on GPUs.
        yield "--disaggregation-enable-kv-checksum"
    elif group.role is Role.DECODE:
        # The default backup needs memory that a GPU driver has pinned.
        yield from ("--disaggregation-decode-retraction-backup", "cpu_tensor")
    if "bootstrap" in assignment.ports:
        yield from ("--disaggregation-bootstrap-port", str(assignment.ports["bootstrap"]))
    if assignment.rdma and _connector(group) != "mooncake_tcp":
        yield from ("--disaggregation-ib-device", ",".join(assignment.rdma))


def _env(topology: Topology, assignment: Assignment) -> dict[str, str]:
    lease_s, read_s = topology.transfer.lease_s, topology.transfer.read_s
    env = {"HF_HUB_DISABLE_TELEMETRY": "1"}
    if assignment.group.role is not Role.HYBRID:
        # SGLang waits 300 s for a peer. The proxy aborts what it gave up; these limits are for when it has died, too.
        timings = {
            "BOOTSTRAP_TIMEOUT": math.ceil(lease_s),
            "WAITING_TIMEOUT": math.ceil(lease_s + read_s),
            "HEARTBEAT_INTERVAL": _HEARTBEAT_S,
            "HEARTBEAT_MAX_FAILURE": _HEARTBEATS,
        }
        env |= {f"SGLANG_DISAGGREGATION_{name}": str(value) for name, value in timings.items()}
    if assignment.group.device is Device.CPU:
        env["CUDA_VISIBLE_DEVICES"] = ""
        # Its events are CUDA's.
        env["SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"] = "0"
    elif assignment.gpus:
        env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(assignment.gpus)}
    return env


LAUNCHER = SglangLauncher()
