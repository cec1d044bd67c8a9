"""Command line and environment of the builtin engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pdctl.adapters import (
    OTLP_EXPORTERS,
    Assignment,
    BaseLauncher,
    Fault,
    Installed,
    Launch,
    Package,
    different_installations,
)
from pdctl.host import ENGINE_PACKAGES
from pdctl.names.policies import SEGMENT_TOKENS
from pdctl.speculative import format_speculative
from pdctl.topology.spec import Device, EngineGroup, Topology, Transfer

# Kinds of stores that its engines can use: see pdctl.engine.tiers.
_STORES = ("mooncake",)
_PARALLEL = ("tensor_parallel", "pipeline_parallel", "sequence_parallel")


class BuiltinLauncher(BaseLauncher):
    """See Launcher. The supervisor sets an engine's role after the start: see control.py."""

    settings = frozenset(
        {
            "open", "max_num_seqs", "max_num_batched_tokens", "kv_cache_gb", "block_size", "policy", "prefix_caching",
            "deterministic", "inline_prefill", "kv_events", "prefix_quota", "kv_offload_gb", "store",
            "dtype", "attention", "enforce_eager",
            "schedule_ahead", "fetch_prefixes", "gpu_memory_utilization", "speculative", "python", "tensor_parallel",
            "pipeline_parallel", "data_parallel", "sequence_parallel",
        }
    )  # fmt: skip
    service_settings = frozenset({"tool_parser", "reasoning_parser"})
    packages = ENGINE_PACKAGES
    tracing = OTLP_EXPORTERS[:1]
    replicates = True
    certified = True

    def requirement(self, device: Device) -> str:
        """See Launcher.requirement."""
        return "pdctl[cuda]" if device is Device.CUDA else "pdctl[engine]"

    def ports(self, group: EngineGroup) -> tuple[str, ...]:
        """See Launcher.ports."""
        return ("kv-events", "kv-replay") if group.kv_events != "off" else ()

    def faults(self, topology: Topology, group: EngineGroup, package: Package) -> Iterable[Fault]:
        """See Launcher.faults."""
        if group.kv_events != "off" and not group.prefix_caching:
            message = "there are no events without a prefix cache"
            yield Fault("kv_events", message, "remove kv_events, or set prefix_caching = true")
        if group.fetch_prefixes != "false" and not group.prefix_caching:
            message = "nothing is kept without a prefix cache"
            yield Fault("fetch_prefixes", message, "remove fetch_prefixes, or set prefix_caching = true")
        yield from _tier_faults(topology, group)
        if group.deterministic and not group.prefix_caching:
            message = "nothing is found without a prefix cache"
            yield Fault("deterministic", message, "remove deterministic, or set prefix_caching = true")
        if group.schedule_ahead == "true" and group.speculative:
            message = "guesses need the newest tokens, so no step is scheduled ahead with them"
            yield Fault("schedule_ahead", message, "remove schedule_ahead, or speculative")
        yield from _parallel_faults(group)
        # The engine checks it again, with whole blocks.
        fewest = SEGMENT_TOKENS + group.max_num_seqs
        if group.deterministic and group.max_num_batched_tokens < fewest:
            message = f"a segment of {SEGMENT_TOKENS} tokens does not fit beside {group.max_num_seqs} sequences"
            yield Fault("deterministic", message, f"set max_num_batched_tokens = {fewest}, or more")

    def pair_faults(self, prefill: Installed, decode: Installed) -> Iterator[Fault]:
        """See Launcher.pair_faults."""
        yield from different_installations(prefill, decode)
        (ours, _), (other, _) = decode, prefill
        if ours.tensor_parallel != other.tensor_parallel and ours.dtype != "float32":
            # Sums are rounded in another order: a stream that goes on at the other width could get another token.
            message = f"{ours.name!r} and {other.name!r} have different widths, which give equal tokens in float32 only"
            yield Fault("tensor_parallel", message, 'set dtype = "float32" on both, or the same tensor_parallel')

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """See Launcher.launch."""
        group = assignment.group
        argv = (
            assignment.python, "-m", "pdctl.engine", "serve",
            "--name", assignment.name,
            "--model", assignment.model_path,
            "--served-model-name", topology.service.served_model_name,
            "--host", assignment.host,
            "--port", str(assignment.ports["http"]),
            "--device", group.device.value,
            "--dtype", group.dtype,
            "--max-model-len", str(topology.service.max_model_len),
            "--max-num-seqs", str(group.max_num_seqs),
            "--max-num-batched-tokens", str(group.max_num_batched_tokens),
            *_kv_argv(group),
            "--block-size", str(group.block_size),
            "--prefix-caching", str(group.prefix_caching).lower(),
            *(("--deterministic", "true") if group.deterministic else ()),
            *_tiers_argv(topology, group),
            *_events_argv(group, assignment.ports),
            "--policy", group.policy,
            "--inline-prefill", str(group.inline_prefill).lower(),
            "--attention", group.attention,
            "--enforce-eager", str(group.enforce_eager).lower(),
            *(("--schedule-ahead", group.schedule_ahead) if group.schedule_ahead != "auto" else ()),
            *(("--fetch-prefixes", group.fetch_prefixes) if group.fetch_prefixes != "false" else ()),
            *(("--speculative", format_speculative(group.speculative)) if group.speculative else ()),
            *_parallel_argv(assignment),
            *_transfer_argv(topology.transfer, assignment.rdma),
            "--tool-parser", topology.service.tool_parser,
            "--reasoning-parser", topology.service.reasoning_parser,
            "--open", str(group.open).lower(),
            *(("--otlp-endpoint", assignment.otlp_endpoint) if assignment.otlp_endpoint else ()),
            "--run-dir", str(assignment.run_dir),
        )  # fmt: skip
        env = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if group.device is Device.CPU:
            # One thread per engine: OpenMP barriers between engines that share cores cost 10x and more.
            env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        elif assignment.gpus:
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(assignment.gpus)}
        return Launch(
            argv=argv,
            env=env,
            ready_path="/health",
            generate_path="/v1/completions",
        )


def _tier_faults(topology: Topology, group: EngineGroup) -> Iterator[Fault]:
    used = [key for key in ("prefix_quota", "kv_offload_gb", "store") if key in group.given]
    if used and not group.prefix_caching:
        message = "nothing is kept without a prefix cache"
        yield Fault(used[0], message, f"remove {used[0]}, or set prefix_caching = true")
    kind = _store_kind(topology, group)
    if kind not in ("", *_STORES):
        message = f"engines of kind 'builtin' cannot use stores of kind {kind!r}"
        yield Fault("store", message, f"use a store of kind {' or '.join(_STORES)}")


def _tiers_argv(topology: Topology, group: EngineGroup) -> tuple[str, ...]:
    kind = _store_kind(topology, group)
    return (
        *(("--prefix-quota", f"{group.prefix_quota:g}") if group.prefix_quota < 1 else ()),
        *(("--kv-offload-gb", f"{group.kv_offload_gb:g}") if group.kv_offload_gb else ()),
        *(("--store", kind) if kind else ()),
    )


def _store_kind(topology: Topology, group: EngineGroup) -> str:
    """The kind of the store that the group uses, if it uses one."""
    return next((store.kind for store in topology.stores if store.name == group.store), "")


def _events_argv(group: EngineGroup, ports: Mapping[str, int]) -> tuple[str, ...]:
    if group.kv_events == "off":
        return ()
    return (
        "--kv-events", group.kv_events,
        "--kv-events-port", str(ports["kv-events"]),
        "--kv-replay-port", str(ports["kv-replay"]),
    )  # fmt: skip


def _parallel_faults(group: EngineGroup) -> Iterator[Fault]:
    key = next((key for key in _PARALLEL if getattr(group, key) > 1), "")
    if not key:
        return
    if group.sequence_parallel > 1 and key != "sequence_parallel":
        message = f"sequence_parallel and {key} cannot be combined"
        yield Fault("sequence_parallel", message, f"remove sequence_parallel, or {key}")
    if group.schedule_ahead == "true":
        message = "a step cannot be scheduled ahead over several devices"
        yield Fault("schedule_ahead", message, f"remove schedule_ahead, or {key}")


def _parallel_argv(assignment: Assignment) -> tuple[str, ...]:
    """How many processes share the model, and the CPUs of each: an equal share of the group's own, if it has any."""
    group = assignment.group
    count = group.tensor_parallel * group.pipeline_parallel * group.sequence_parallel
    used = [key for key in _PARALLEL if getattr(group, key) > 1]
    argv = tuple(word for key in used for word in (f"--{key.replace('_', '-')}", str(getattr(group, key))))
    if not argv:
        return ()
    each, rest = divmod(len(assignment.cpus), count)
    if not group.cpus or rest or not each:
        return argv
    shares = [assignment.cpus[rank * each : (rank + 1) * each] for rank in range(count)]
    words = ";".join(",".join(map(str, share)) for share in shares)
    return *argv, "--rank-cpus", words


def _kv_argv(group: EngineGroup) -> tuple[str, ...]:
    if group.kv_share:
        return "--gpu-memory-utilization", f"{group.kv_share:g}"
    return "--kv-cache-gb", f"{group.kv_cache_gb:g}"


def _transfer_argv(transfer: Transfer, devices: tuple[str, ...]) -> tuple[str, ...]:
    return (
        "--transfer", transfer.backend,
        "--transfer-protocol", transfer.protocol,
        "--transfer-devices", ",".join(devices),
        "--transfer-ports", "-".join(map(str, transfer.ports)),
        "--lease-s", f"{transfer.lease_s:g}",
        "--read-s", f"{transfer.read_s:g}",
        "--leased-max", f"{transfer.leased_max:g}",
        "--chunked", str(transfer.chunked).lower(),
    )  # fmt: skip


LAUNCHER = BuiltinLauncher()
