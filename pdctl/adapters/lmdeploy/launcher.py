"""Command line and environment of LMDeploy's api_server with its PyTorch engine, 0.16 and later.

The flags are those of 0.18. DistServe has no ports to plan: an engine binds one free port per peer for ZeroMQ, and its
processes talk over ports of their own choice; LMDeploy has no option for either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator

from pdctl.adapters import (
    Assignment,
    BaseLauncher,
    Fault,
    Installed,
    Launch,
    Package,
    different_installations,
    option_faults,
)
from pdctl.adapters.lmdeploy.log import FAILURES, PHASES
from pdctl.topology.spec import Device, EngineGroup, Role, Topology

# LMDeploy takes its API key only as an argument, which every user of the machine can read. So a line of Python takes it
# from the environment, and adds it where only LMDeploy sees it.
_KEY = "LMDEPLOY_API_KEY"
_START = f"import os, sys; from lmdeploy.cli import run; sys.argv += ['--api-keys', os.environ.pop('{_KEY}')]; run()"
# Options that pdctl sets. In `args` they would contradict the plan.
_OURS = (
    "--server-name", "--server-port", "--model-name", "--session-len", "--api-keys", "--role", "--migration-backend",
    "--tp", "--dp", "--dtype", "--backend", "--proxy-url", "--ssl", "--disable-metrics", "--max-prefill-token-num",
    "--cache-block-seq-len",
)  # fmt: skip
# Earlier versions unpickle what a peer sends (LMDeploy #4804).
_OLDEST = (0, 16, 0)
_OLDEST_SHOWN = ".".join(map(str, _OLDEST))
_DEFAULT_BLOCK = 64


class LmdeployLauncher(BaseLauncher):
    """See Launcher."""

    device = Device.CUDA
    settings = frozenset(
        {
            "python", "args", "tensor_parallel", "dtype", "quantization", "gpu_memory_utilization", "connector",
            "max_num_seqs", "max_num_batched_tokens", "block_size",
        }
    )  # fmt: skip
    distributions = ("lmdeploy",)
    connectors = ("DLSlime", "Mooncake")
    phases = PHASES
    failures = FAILURES

    def requirement(self, device: Device) -> str:
        """See Launcher.requirement."""
        return "lmdeploy"

    def faults(self, topology: Topology, group: EngineGroup, package: Package) -> Iterable[Fault]:
        """See Launcher.faults."""
        version = tuple(int(part) for part in re.findall(r"\d+", package[1].split("+")[0])[:3])
        if version and version < _OLDEST:
            message = f"lmdeploy {package[1]} is too old: its engines run code that a peer sends (LMDeploy #4804)"
            yield Fault("python", message, f"install version {_OLDEST_SHOWN} or later")
        if group.device is Device.CPU:
            message = "LMDeploy has no engine for CPUs (LMDeploy #2586)"
            yield Fault("device", message, 'set device = "cuda", or use another kind')
        yield from _argument_faults(topology, group)
        yield from _peer_faults(topology, group)

    def pair_faults(self, prefill: Installed, decode: Installed) -> Iterable[Fault]:
        """See Launcher.pair_faults."""
        ours, other = decode.group, prefill.group
        for key, setting in _SAME.items():
            if setting(ours) != setting(other):
                message = f"{key} of {ours.name!r} is {setting(ours)}, that of {other.name!r} is {setting(other)}"
                yield Fault(key, message, "LMDeploy needs the same at both ends of a link")
        yield from different_installations(prefill, decode)

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """See Launcher.launch."""
        env = {"PYTHONUNBUFFERED": "1"}
        if assignment.gpus:
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(assignment.gpus)}
        if assignment.rdma:
            env["SLIME_VISIBLE_DEVICES"] = ",".join(assignment.rdma)
        one_token = {"model": topology.service.served_model_name, "prompt": "a", "max_tokens": 1, "temperature": 0}
        return Launch(
            argv=tuple(_argv(topology, assignment)),
            env=env,
            ready_path="/health",
            generate_path="/v1/completions",
            generate_body=json.dumps(one_token, separators=(",", ":")),
            ready_generates=True,
            api_key_env=_KEY,
        )


def _argument_faults(topology: Topology, group: EngineGroup) -> Iterator[Fault]:
    yield from option_faults(group, _OURS)
    longest = topology.service.max_model_len
    too_few = "max_num_batched_tokens" in group.given and group.max_num_batched_tokens < longest
    if group.role is Role.PREFILL and too_few:
        message = f"a prefill engine of LMDeploy stalls at prompts above {group.max_num_batched_tokens} tokens (#4977)"
        yield Fault("max_num_batched_tokens", message, f"remove it, or set it to max_model_len: {longest}")


def _peer_faults(topology: Topology, group: EngineGroup) -> Iterator[Fault]:
    others = {other.role for other in topology.all_engines if other.kind == group.kind} - {group.role, Role.HYBRID}
    if group.role is not Role.HYBRID and not others:
        message = f"no other engine can exchange KV with {group.name!r}"
        yield Fault("role", message, "add one of kind lmdeploy with the other role; hybrid engines work alone")


def _connector(group: EngineGroup) -> str:
    return group.connector or LmdeployLauncher.connectors[0]


def _block_size(group: EngineGroup) -> int:
    return group.block_size if "block_size" in group.given else _DEFAULT_BLOCK


# Keys that must be the same at both ends of a link, beside those that must be for every kind.
_SAME: dict[str, Callable[[EngineGroup], object]] = {
    "tensor_parallel": lambda group: group.tensor_parallel,
    "block_size": _block_size,
    "connector": _connector,
}


def _argv(topology: Topology, assignment: Assignment) -> Iterator[str]:
    group, service = assignment.group, topology.service
    # Turbomind, the default backend, has no DistServe.
    yield from (
        assignment.python, "-c", _START, "serve", "api_server", assignment.model_path,
        "--backend", "pytorch",
        "--model-name", service.served_model_name,
        "--server-name", assignment.host,
        "--server-port", str(assignment.ports["http"]),
        "--session-len", str(service.max_model_len),
        "--role", group.role.value.capitalize(),
        "--migration-backend", _connector(group),
        "--dtype", group.dtype,
        "--tp", str(group.tensor_parallel),
        "--cache-block-seq-len", str(_block_size(group)),
        "--log-level", "INFO",
    )  # fmt: skip
    batched = group.max_num_batched_tokens if "max_num_batched_tokens" in group.given else service.max_model_len
    yield from ("--max-prefill-token-num", str(batched))
    if "max_num_seqs" in group.given:
        yield from ("--max-batch-size", str(group.max_num_seqs))
    if "quantization" in group.given:
        yield from ("--model-format", group.quantization)
    if "gpu_memory_utilization" in group.given:
        yield from ("--cache-max-entry-count", f"{group.gpu_memory_utilization:g}")
    yield from group.args


LAUNCHER = LmdeployLauncher()
