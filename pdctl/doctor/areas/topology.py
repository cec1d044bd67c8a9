"""Checks of a topology against this machine: everything that `pdctl up` would refuse, and what it would regret.

Tensor-parallel sizes are not among them: no kind that pdctl starts has any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from pdctl.doctor import Finding, Severity
from pdctl.errors import Problem
from pdctl.host import Host
from pdctl.host.models import ModelShape, missing_shards, read_shape, weight_files
from pdctl.topology.spec import Device, EngineGroup, Role, Topology

# What CUDA's context, torch's kernels and activations take beside weights and KV, bytes. The project's own estimate.
_GPU_EXTRA = 2 << 30


@dataclass(frozen=True, slots=True)
class TopologyFacts:
    """`model`: its folder, None where it is not on this machine yet; `placed`: engines by GPU and group."""

    topology: Topology
    host: Host
    model: Path | None = None
    placed: dict[int, dict[str, int]] = field(default_factory=dict, hash=False)

    def started(self) -> list[EngineGroup]:
        """Engines that pdctl starts."""
        return [group for group in self.topology.engines if not group.is_attached]

    def shape(self) -> ModelShape | None:
        """What the model takes."""
        return read_shape(self.model) if self.model and self.started() else None


def problems(source: str, found: list[Problem]) -> list[Finding]:
    """What the loader refuses."""
    return [
        Finding(
            "topology.invalid", Severity.CRITICAL, problem.key or source, problem.message, "",
            f"{source}:{problem.line}" if problem.line else source, "", problem.hint or "correct that line",
        )
        for problem in found
    ]  # fmt: skip


def check(facts: TopologyFacts) -> list[Finding]:
    """What a valid topology may still get wrong."""
    found = [finding for one in CHECKS for finding in one(facts)]
    if all(finding.severity is Severity.INFO for finding in found):
        source = facts.topology.source or "topology"
        found.append(Finding("topology.valid", Severity.OK, source, "nothing to be said against it"))
    return found


def weights(facts: TopologyFacts) -> Iterator[Finding]:
    """A folder with a config and no weights."""
    missing = missing_shards(facts.model) if facts.model and facts.started() else []
    if missing and facts.model:
        yield Finding(
            "model.weights", Severity.CRITICAL, str(facts.model), f"{len(missing)} files are missing: {missing[0]} ...",
            "every file that the index names", f"{facts.model}/model.safetensors.index.json", "a download that was cut",
            "fetch it again",
        )  # fmt: skip
    elif facts.model and facts.started() and not weight_files(facts.model) and not list(facts.model.glob("*.bin")):
        yield Finding(
            "model.weights", Severity.CRITICAL, str(facts.model), "no weights", "*.safetensors",
            str(facts.model), "a download that was cut, or weights in another format",
            "fetch it again, or convert it to safetensors",
        )  # fmt: skip


def context(facts: TopologyFacts) -> Iterator[Finding]:
    """More tokens than the model has positions for."""
    shape, wanted = facts.shape(), facts.topology.service.max_model_len
    if shape and shape.positions and wanted > shape.positions:
        yield Finding(
            "topology.context", Severity.CRITICAL, "service.max_model_len", f"{wanted} tokens",
            f"at most {shape.positions}, the model's positions", f"{facts.model}/config.json",
            "engines refuse to start", f"max_model_len = {shape.positions} under [service]",
        )  # fmt: skip


def pools(facts: TopologyFacts) -> Iterator[Finding]:
    """KV pools that cannot hold one request of the full length."""
    shape, wanted = facts.shape(), facts.topology.service.max_model_len
    if shape is None or not shape.kv_token_bytes:
        return
    for group in facts.started():
        token = shape.kv_token_bytes * (2 if group.device is Device.CPU else 1)
        room = int(group.kv_cache_gb * 2**30) // token
        if room < wanted:
            least = math.ceil(wanted * token / 2**30 * 1000) / 1000
            yield Finding(
                "topology.kv_pool", Severity.WARNING, group.name,
                f"kv_cache_gb = {group.kv_cache_gb:g} holds {room} tokens", f"max_model_len = {wanted}",
                "kv_cache_gb, config.json", "longer requests are refused",
                f"kv_cache_gb = {least:g}, or max_model_len = {room}",
            )  # fmt: skip


def gpu_memory(facts: TopologyFacts) -> Iterator[Finding]:
    """Weights and KV pools of all engines on a GPU, against what it has."""
    shape = facts.shape()
    each = (shape.weight_bytes if shape else 0) + _GPU_EXTRA
    for gpu in facts.host.gpus:
        groups = facts.placed.get(gpu.index, {})
        here = [(group, groups[group.name]) for group in facts.started() if group.name in groups]
        wanted = sum((group.kv_cache_gb * 2**30 + each) * count for group, count in here)
        if not here or wanted <= gpu.memory:
            continue
        names = ", ".join(group.name if count == 1 else f"{count} of {group.name}" for group, count in here)
        engines = sum(count for _, count in here)
        # Without what is only estimated, it is certain.
        certain = wanted - _GPU_EXTRA * engines > gpu.memory
        fits = math.floor((gpu.memory - each * engines) / engines / 2**30 * 10) / 10
        yield Finding(
            "gpu.memory", Severity.CRITICAL if certain else Severity.WARNING, f"GPU {gpu.index}",
            f"{names} want {wanted / 2**30:.1f} GiB: KV, weights, and {_GPU_EXTRA >> 30} GiB each for the rest",
            f"at most {gpu.memory / 2**30:.0f} GiB", "kv_cache_gb, the model's files, NVML",
            "the last engine to start runs out of memory",
            f"kv_cache_gb = {fits:g} for each, or a GPU for each" if fits > 0 else "a GPU for each, or a smaller model",
        )  # fmt: skip


def pairs(facts: TopologyFacts) -> Iterator[Finding]:
    """Engines that cannot read each other's KV: of different kinds."""
    groups = facts.topology.engines
    prefills = [group for group in groups if group.role is not Role.DECODE]
    decodes = [group for group in groups if group.role is not Role.PREFILL]
    wrong = [(p, d) for p, d in product(prefills, decodes) if p.kind != d.kind and Role.HYBRID not in (p.role, d.role)]
    right = [(p, d) for p, d in product(prefills, decodes) if p.kind == d.kind]
    for prefill, decode in wrong:
        yield Finding(
            "topology.pairs", Severity.WARNING if right else Severity.CRITICAL, f"{prefill.name} to {decode.name}",
            f"{prefill.kind} cannot hand KV to {decode.kind}", "engines of one kind", "[[engines]] kind", "",
            f'kind = "{prefill.kind}" for both, or prefill and decode engines of each kind',
        )  # fmt: skip


def blocks(facts: TopologyFacts) -> Iterator[Finding]:
    """Block sizes that differ are copied token by token's worth, in more and smaller pieces."""
    sizes = {group.block_size: group.name for group in facts.started()}
    if len(sizes) > 1:
        shown = ", ".join(f"{name}: {size}" for size, name in sorted(sizes.items()))
        yield Finding(
            "topology.blocks", Severity.INFO, "block_size", shown, "one size", "[[engines]] block_size",
            "hand-overs move more, smaller pieces", f"block_size = {max(sizes)} for all",
        )  # fmt: skip


def secrets(facts: TopologyFacts) -> Iterator[Finding]:
    """Attached engines whose secret cannot be read."""
    for group in facts.topology.engines:
        if group.secret_file and not _is_readable(Path(group.secret_file)):
            yield Finding(
                "topology.secret", Severity.CRITICAL, group.name, f"{group.secret_file} cannot be read",
                "a file with the engine's bearer token", "[[engines]] secret_file", "the engine refuses every call",
                f"write the token there, and: chmod 600 {group.secret_file}",
            )  # fmt: skip


def roles(facts: TopologyFacts) -> Iterator[Finding]:
    """One of a role is a single point of waiting."""
    count = {role: sum(g.replicas for g in facts.topology.engines if g.role is role) for role in Role}
    for role in (Role.PREFILL, Role.DECODE):
        if count[role] == 1 and not count[Role.HYBRID]:
            yield Finding(
                "topology.single", Severity.INFO, role.value, f"one {role.value} engine", "two, to go on at once", "",
                "while it restarts, requests wait for it", "replicas = 2",
            )  # fmt: skip


def _is_readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


CHECKS: tuple[Callable[[TopologyFacts], Iterator[Finding]], ...] = (
    weights, context, pools, gpu_memory, pairs, blocks, secrets, roles,
)  # fmt: skip
