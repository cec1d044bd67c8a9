"""Checks of a topology against this machine: problems for which `pdctl up` refuses it, and problems that appear later.

Tensor-parallel sizes are not checked: no kind that pdctl starts has any.
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

# Bytes for the CUDA context, torch's kernels and activations, besides weights and KV. pdctl's own estimate.
_GPU_EXTRA = 2 << 30


@dataclass(frozen=True, slots=True)
class TopologyFacts:
    """Facts for topology checks. `model`: the model's folder, None if it is not on this machine yet; `placed`: number
    of engines by GPU and group."""

    topology: Topology
    host: Host
    model: Path | None = None
    placed: dict[int, dict[str, int]] = field(default_factory=dict, hash=False)

    def started(self) -> list[EngineGroup]:
        """Engine groups that pdctl starts."""
        return [group for group in self.topology.engines if not group.is_attached]

    def shape(self) -> ModelShape | None:
        """The model's shape, if known."""
        return read_shape(self.model) if self.model and self.started() else None


def problems(source: str, found: list[Problem]) -> list[Finding]:
    """The loader's problems as findings."""
    return [
        Finding(
            "topology.invalid", Severity.CRITICAL, problem.key or source, problem.message, "",
            f"{source}:{problem.line}" if problem.line else source, "", problem.hint or "correct that line",
        )
        for problem in found
    ]  # fmt: skip


def check(facts: TopologyFacts) -> list[Finding]:
    """Run all checks of a valid topology."""
    found = [finding for one in CHECKS for finding in one(facts)]
    if all(finding.severity is Severity.INFO for finding in found):
        source = facts.topology.source or "topology"
        found.append(Finding("topology.valid", Severity.OK, source, "no problems found"))
    return found


def weights(facts: TopologyFacts) -> Iterator[Finding]:
    """Model folders without weights, or with some missing."""
    missing = missing_shards(facts.model) if facts.model and facts.started() else []
    if missing and facts.model:
        yield Finding(
            "model.weights", Severity.CRITICAL, str(facts.model), f"{len(missing)} files are missing: {missing[0]} ...",
            "every file in the index", f"{facts.model}/model.safetensors.index.json", "an incomplete download",
            "download it again",
        )  # fmt: skip
    elif facts.model and facts.started() and not weight_files(facts.model) and not list(facts.model.glob("*.bin")):
        yield Finding(
            "model.weights", Severity.CRITICAL, str(facts.model), "no weights", "*.safetensors",
            str(facts.model), "an incomplete download, or weights in another format",
            "download it again, or convert it to safetensors",
        )  # fmt: skip


def context(facts: TopologyFacts) -> Iterator[Finding]:
    """A max_model_len above the model's maximum positions."""
    shape, wanted = facts.shape(), facts.topology.service.max_model_len
    if shape and shape.positions and wanted > shape.positions:
        yield Finding(
            "topology.context", Severity.CRITICAL, "service.max_model_len", f"{wanted} tokens",
            f"at most {shape.positions}, the model's maximum positions", f"{facts.model}/config.json",
            "engines refuse to start", f"max_model_len = {shape.positions} under [service]",
        )  # fmt: skip


def pools(facts: TopologyFacts) -> Iterator[Finding]:
    """KV pools that cannot hold one request of full length."""
    shape, wanted = facts.shape(), facts.topology.service.max_model_len
    if shape is None or not shape.kv_token_bytes:
        return
    for group in facts.started():
        if group.kv_share:
            continue  # as large as what is left of the GPU
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
    """Weights and KV pools of all engines on a GPU, compared with its memory."""
    shape = facts.shape()
    each = (shape.weight_bytes if shape else 0) + _GPU_EXTRA
    for gpu in facts.host.gpus:
        groups = facts.placed.get(gpu.index, {})
        here = [(group, groups[group.name]) for group in facts.started() if group.name in groups]
        sizes = [(0 if group.kv_share else group.kv_cache_gb * 2**30, count) for group, count in here]
        wanted = sum((size + each) * count for size, count in sizes)
        if not here or wanted <= gpu.memory:
            continue
        names = ", ".join(group.name if count == 1 else f"{count} of {group.name}" for group, count in here)
        engines = sum(count for _, count in here)
        # Without the estimated part, it is certain.
        certain = wanted - _GPU_EXTRA * engines > gpu.memory
        fits = math.floor((gpu.memory - each * engines) / engines / 2**30 * 10) / 10
        yield Finding(
            "gpu.memory", Severity.CRITICAL if certain else Severity.WARNING, f"GPU {gpu.index}",
            f"{names} need {wanted / 2**30:.1f} GiB: KV, weights, and {_GPU_EXTRA >> 30} GiB each for the rest",
            f"at most {gpu.memory / 2**30:.0f} GiB", "kv_cache_gb, the model's files, NVML",
            "the last engine to start runs out of memory",
            f"kv_cache_gb = {fits:g} for each, or one GPU per engine"
            if fits > 0
            else "one GPU per engine, or a smaller model",
        )  # fmt: skip


def pairs(facts: TopologyFacts) -> Iterator[Finding]:
    """Prefill and decode engines of different kinds, which cannot read each other's KV."""
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
    """Different block sizes: transfers then need more and smaller pieces."""
    sizes = {group.block_size: group.name for group in facts.started()}
    if len(sizes) > 1:
        shown = ", ".join(f"{name}: {size}" for size, name in sorted(sizes.items()))
        yield Finding(
            "topology.blocks", Severity.INFO, "block_size", shown, "one size", "[[engines]] block_size",
            "hand-overs move more and smaller pieces", f"block_size = {max(sizes)} for all",
        )  # fmt: skip


def secrets(facts: TopologyFacts) -> Iterator[Finding]:
    """Attached engines with a secret file that cannot be read."""
    for group in facts.topology.engines:
        if group.secret_file and not _is_readable(Path(group.secret_file)):
            yield Finding(
                "topology.secret", Severity.CRITICAL, group.name, f"{group.secret_file} cannot be read",
                "a file with the engine's bearer token", "[[engines]] secret_file", "the engine refuses every call",
                f"write the token there, and: chmod 600 {group.secret_file}",
            )  # fmt: skip


def roles(facts: TopologyFacts) -> Iterator[Finding]:
    """Roles with only one engine: requests wait while it restarts."""
    count = {role: sum(g.replicas for g in facts.topology.engines if g.role is role) for role in Role}
    for role in (Role.PREFILL, Role.DECODE):
        if count[role] == 1 and not count[Role.HYBRID]:
            yield Finding(
                "topology.single", Severity.INFO, role.value, f"one {role.value} engine",
                "two, so that requests can continue on the other", "",
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
