"""Checks a topology against this machine: packages, model, CPUs, GPUs, memory."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pdctl import __version__
from pdctl.adapters import Installed, launcher
from pdctl.errors import Problem
from pdctl.host import OTLP_PACKAGES, Host
from pdctl.host.models import UnknownModel, cannot_split, cannot_stage, locate_model
from pdctl.host.program import ENGINE_HINT
from pdctl.stores import store_launcher
from pdctl.topology.document import Document
from pdctl.topology.spec import Device, EngineGroup, Role, Topology
from pdctl.topology.toml_lines import Path as KeyPath


def host_problems(document: Document, topology: Topology, host: Host) -> Iterator[Problem]:
    """Yield every requirement of the topology that this machine does not meet."""
    yield from _package_problems(document, topology, host)
    yield from _program_problems(document, topology, host)
    yield from _model_problems(document, topology, host)
    yield from _cpu_problems(document, topology, host)
    yield from _gpu_problems(document, topology, host)
    yield from _memory_problems(document, topology, host)


def facts_problems(document: Document, topology: Topology, host: Host) -> Iterator[Problem]:
    """Yield every requirement that a machine elsewhere does not meet, as far as its facts tell: its files are not
    here."""
    for index, group in enumerate(topology.engines):
        if group.is_attached or group.python:
            continue
        starts = launcher(group.kind)
        missing = host.lacks(starts.packages)
        if starts.distributions and host.package_in(host.python, starts.distributions) is None:
            missing.append(" or ".join(starts.distributions))
        if missing:
            hint = f"install them there: {host.python} -m pip install '{starts.requirement(group.device)}'"
            message = f"engines of kind {group.kind!r} need packages that are not installed: {', '.join(missing)}"
            yield document.problem(("engines", index), message, hint)
    yield from _cpu_problems(document, topology, host)
    yield from _gpu_problems(document, topology, host)
    yield from _memory_problems(document, topology, host)


def _package_problems(document: Document, topology: Topology, host: Host) -> Iterator[Problem]:
    """Python packages that are needed but not installed."""
    if topology.proxy.otlp_endpoint and host.lacks(OTLP_PACKAGES):
        hint = "install it with: pip install 'pdctl[otlp]'"
        yield document.problem(("proxy", "otlp_endpoint"), "the OpenTelemetry packages are not installed", hint)
    for index, group in enumerate(topology.engines):
        if group.is_attached:
            continue
        python = group.python or host.python
        if not python:
            yield document.problem(("engines", index), _NO_PYTHON, _python_hint(group))
            continue
        yield from _python_problems(document, index, group, host)
        if launcher(group.kind).packages and python != (host.program or host.python):
            yield from _own_engine_problems(document, index, group, host)
            continue
        missing = host.lacks(launcher(group.kind).packages)
        if missing:
            hint = f"install them with: pip install '{launcher(group.kind).requirement(group.device)}'"
            message = f"engines of kind {group.kind!r} need packages that are not installed: {', '.join(missing)}"
            yield document.problem(("engines", index), message, hint)
            # One report is enough: other groups usually miss the same packages.
            return


_NO_PYTHON = "python is missing: this pdctl is a binary, which has none for other processes"


def _python_hint(group: EngineGroup) -> str:
    if launcher(group.kind).packages:
        return ENGINE_HINT
    wanted = launcher(group.kind).requirement(group.device)
    return f"set python to the interpreter of the environment that has {wanted}, such as ~/{group.kind}/bin/python"


def _own_engine_problems(document: Document, index: int, group: EngineGroup, host: Host) -> Iterator[Problem]:
    """pdctl's own engine is not in the environment of the group's interpreter, or another version of it."""
    python = group.python or host.python
    path: KeyPath = ("engines", index, "python") if group.python else ("engines", index)
    wanted = launcher(group.kind).requirement(group.device)
    install = f"install it there: {python} -m pip install '{wanted.replace(']', f']=={__version__}')}'"
    if not os.access(python, os.X_OK):
        hint = f"make the environment: python3 -m venv {Path(python).parent.parent}; then {install}"
        yield document.problem(path, f"{python} does not exist or cannot be executed", hint)
        return
    _, found = host.package_in(python, ("pdctl",)) or ("", "")
    if found != __version__:
        said = f"has pdctl {found}, and this is pdctl {__version__}" if found else "has no package pdctl"
        yield document.problem(path, f"the environment of {python} {said}", install)
        return
    needed = launcher(group.kind).packages
    missing = [name for name in needed if host.package_in(python, _NAMES.get(name, (name,))) is None]
    if missing:
        message = f"the environment of {python} lacks packages of the engine: {', '.join(missing)}"
        yield document.problem(path, message, install)


# The distribution of a module that has another name.
_NAMES = {"zmq": ("pyzmq",)}


def _python_problems(document: Document, index: int, group: EngineGroup, host: Host) -> Iterator[Problem]:
    """The engine's package is missing in the environment of the group's interpreter."""
    wanted = launcher(group.kind).distributions
    if not wanted:
        return
    python = group.python or host.python
    path: KeyPath = ("engines", index, "python" if group.python else "kind")
    if group.python and not os.access(python, os.X_OK):
        hint = "python names the interpreter of the environment that has the engine, such as ~/vllm/bin/python"
        yield document.problem(path, f"{python} does not exist or cannot be executed", hint)
    elif host.package_in(python, wanted) is None:
        hint = f"install it there: {python} -m pip install {launcher(group.kind).requirement(group.device)}"
        if not group.python:
            hint += ", or set python to the interpreter that has it"
        message = f"the environment of {python} has no package {' or '.join(wanted)}"
        yield document.problem(path, message, hint)


def _program_problems(document: Document, topology: Topology, host: Host) -> Iterator[Problem]:
    """Programs of processes, and packages of stores, that are not installed."""
    for index, entry in enumerate(topology.processes):
        program = entry.command[0]
        # A program may be in a folder that only its own PATH names.
        if shutil.which(program, path=dict(entry.env).get("PATH")) is None:
            hint = "the first word is an executable in PATH, or a path relative to this file's folder"
            path: KeyPath = ("processes", index, "command")
            yield document.problem(path, f"{program} does not exist or cannot be executed", hint)
    for index, store in enumerate(topology.stores):
        starts, python = store_launcher(store.kind), store.python or host.python
        if not python:
            hint = f"set python to the interpreter of the environment that has {starts.requirement}"
            yield document.problem(("stores", index, "kind"), _NO_PYTHON, hint)
        elif host.package_in(python, starts.distributions) is None:
            message = f"the environment of {python} has no package {' or '.join(starts.distributions)}"
            hint = f"install it there: {python} -m pip install {starts.requirement}"
            yield document.problem(("stores", index, "python" if store.python else "kind"), message, hint)
        if store.data_dir and not os.access(store.data_dir, os.W_OK | os.X_OK):
            message = f"{store.data_dir} does not exist or cannot be written"
            yield document.problem(("stores", index, "data_dir"), message, f"create it with: mkdir {store.data_dir}")


def fault_problems(document: Document, topology: Topology, host: Host) -> Iterator[Problem]:
    """Yield the settings that the launcher of a group's kind refuses, given the installed version."""
    for index, group in enumerate(topology.engines):
        if group.is_attached:
            continue
        starts, found = launcher(group.kind), _installed(group, host)
        faults = [*starts.faults(topology, group, found.package)]
        if group.role is Role.DECODE:
            for other in topology.engines:
                if other.role is Role.PREFILL and other.kind == group.kind and not other.is_attached:
                    faults += starts.pair_faults(_installed(other, host), found)
        for fault in faults:
            yield document.problem(("engines", index, fault.key), fault.message, fault.hint)


def _installed(group: EngineGroup, host: Host) -> Installed:
    distributions = launcher(group.kind).distributions
    return Installed(group, host.package_in(group.python or host.python, distributions) or ("", ""))


def _model_problems(document: Document, topology: Topology, host: Host) -> Iterator[Problem]:
    if all(group.is_attached for group in topology.engines):
        return  # only the model's name is needed
    base = Path(topology.source).parent if topology.source else Path()
    try:
        model = locate_model(topology.service.model, host.cache_root, base)
    except UnknownModel as failure:
        yield document.problem(("service", "model"), str(failure), _nearby_model(topology.service.model, base))
        return
    for index, group in enumerate(topology.engines):
        if group.is_attached or not model.ready:
            continue
        path = Path(model.path)
        if group.tensor_parallel > 1 and (reason := cannot_split(path, group.tensor_parallel)):
            message = f"{topology.service.model} cannot be split: {reason}"
            yield document.problem(("engines", index, "tensor_parallel"), message, "each device needs whole heads")
        if group.pipeline_parallel > 1 and (reason := cannot_stage(path, group.pipeline_parallel)):
            message = f"{topology.service.model} cannot be split: {reason}"
            yield document.problem(("engines", index, "pipeline_parallel"), message, "each device needs a layer")


def _nearby_model(spec: str, base: Path) -> str | None:
    """A hint with a model directory of similar name in the same folder."""
    wanted = base / Path(spec).expanduser()
    try:
        there = [folder.name for folder in wanted.parent.iterdir() if (folder / "config.json").is_file()]
    except OSError:
        return None
    near = difflib.get_close_matches(wanted.name, there, 1)
    return f'did you mean model = "{Path(spec).parent / near[0]}"?' if near else None


def _cpu_problems(document: Document, topology: Topology, host: Host) -> Iterator[Problem]:
    wanted: list[tuple[KeyPath, tuple[int, ...]]] = [(("proxy", "cpus"), topology.proxy.cpus)]
    wanted += [(("engines", index, "cpus"), group.cpus) for index, group in enumerate(topology.engines)]
    wanted += [(("processes", index, "cpus"), entry.cpus) for index, entry in enumerate(topology.processes)]
    wanted += [(("stores", index, "cpus"), store.cpus) for index, store in enumerate(topology.stores)]
    allowed = ", ".join(map(str, host.cpus))
    for path, cpus in wanted:
        for cpu in cpus:
            if cpu not in host.cpus:
                yield document.problem(
                    path, f"CPU {cpu} does not exist or is not available to pdctl", f"available: {allowed}"
                )


def _memory_problems(document: Document, topology: Topology, host: Host) -> Iterator[Problem]:
    needed = [_host_kv_gb(topology, group) for group in topology.engines]
    there = host.memory / 2**30
    if sum(needed) > there:
        # The problem has no line of its own; report it at the group that needs most.
        index = needed.index(max(needed))
        largest = "kv_offload_gb" if topology.engines[index].kv_offload_gb else "kv_cache_gb"
        message = f"the engines' KV needs {sum(needed):g} GiB in total, but this machine has {there:.0f} GiB of memory"
        yield document.problem(("engines", index, largest), message, f"lower {largest} or replicas")


def _host_kv_gb(topology: Topology, group: EngineGroup) -> float:
    """GiB of this machine's memory for the KV of a group's engines, and for their part of a store."""
    if group.is_attached:
        return 0.0
    of_store = next((store for store in topology.stores if store.name == group.store), None)
    shared = of_store.segment_gb + of_store.buffer_gb if of_store is not None else 0.0
    own = group.kv_cache_gb if group.device is Device.CPU else 0.0
    return (own + group.kv_offload_gb + shared) * group.replicas


def _gpu_problems(document: Document, topology: Topology, host: Host) -> Iterator[Problem]:
    holders: dict[int | str, tuple[str, bool]] = {}
    known = ", ".join(str(gpu.index) if gpu.index >= 0 else gpu.uuid for gpu in host.gpus) or "none"
    ours = f"available through {host.gpus_by}: {known}" if host.gpus_by else f"NVML lists: {known}"
    for index, group in enumerate(topology.engines):
        if group.device is not Device.CUDA:
            continue
        path: KeyPath = ("engines", index, "gpus" if group.gpus else "device")
        if group.gpus and len(group.gpus) not in (group.gpus_per_replica, group.gpus_per_replica * group.replicas):
            yield from _count_problem(document, path, group)
        yield from _unknown_gpus(document, path, group.gpus, host, ours)
        if not host.gpus:
            if host.gpus_by:
                yield document.problem(path, "the environment makes no GPU available", host.gpus_by)
                continue
            hint = "check nvidia-smi, and whether nvidia-ml-py is installed (pip install 'pdctl[cuda]')"
            yield document.problem(path, "no GPU was found on this machine", hint)
        yield from _sharing_problems(document, path, group, holders)
    for index, entry in enumerate(topology.processes):
        path = ("processes", index, "gpus")
        yield from _unknown_gpus(document, path, entry.gpus, host, ours)
        for gpu in entry.gpus:
            yield from _holder_problems(document, path, gpu, (entry.name, entry.share_gpu), holders)


def _unknown_gpus(
    document: Document, path: KeyPath, gpus: tuple[int | str, ...], host: Host, ours: str
) -> Iterator[Problem]:
    for gpu in gpus:
        if host.gpu_named(gpu) is None:
            what = "is not available to pdctl" if host.gpus_by else "does not exist, or the name is ambiguous"
            yield document.problem(path, f"GPU {gpu} {what}", ours)


def _count_problem(document: Document, path: KeyPath, group: EngineGroup) -> Iterator[Problem]:
    each, count = group.gpus_per_replica, len(group.gpus)
    if each == 1:
        message, hint = f"{count} gpus for {group.replicas} replicas", "list one GPU per replica"
        if group.replicas == 1 and "tensor_parallel" in launcher(group.kind).settings:
            hint += f", or set tensor_parallel = {count} for one engine on {count} GPUs"
    else:
        message = f"{count} gpus for {group.replicas} replicas of {each} GPUs"
        hint = f"list {each * group.replicas} GPUs: the product of the parallel sizes for each replica"
    yield document.problem(path, message, hint)


def _sharing_problems(
    document: Document, path: KeyPath, group: EngineGroup, holders: dict[int | str, tuple[str, bool]]
) -> Iterator[Problem]:
    # The GPUs of one replica are used by all replicas; more are spread over them.
    each = group.gpus_per_replica
    spread = group.gpus * group.replicas if len(group.gpus) == each else group.gpus
    names = [name for name in group.replica_names() for _ in range(each)]
    for name, gpu in zip(names, spread, strict=False):
        yield from _holder_problems(document, path, gpu, (name, group.share_gpu), holders)


def _holder_problems(
    document: Document,
    path: KeyPath,
    gpu: int | str,
    holder: tuple[str, bool],
    holders: dict[int | str, tuple[str, bool]],
) -> Iterator[Problem]:
    """A GPU with two holders: each has a name, and says whether it shares its GPUs."""
    if gpu in holders and not (holder[1] and holders[gpu][1]):
        message = f"GPU {gpu} is assigned to both {holders[gpu][0]} and {holder[0]}"
        yield document.problem(path, message, "assign one GPU to each, or set share_gpu = true on both")
    holders.setdefault(gpu, holder)
