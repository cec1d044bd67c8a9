"""The environment of an agent that a Ray process starts: the node's own, without what Ray puts into it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pdctl.host.devices.allotment import allotted
from pdctl.host.devices.gpu import Gpu

_GPUS = "CUDA_VISIBLE_DEVICES"
_PRELOAD = "LD_PRELOAD"
# What a worker has in addition to its raylet.
_OF_WORKERS = ("SPT_NOENV", "OMP_NUM_THREADS", "PYTHONBREAKPOINT", _GPUS)


def environment_of(raylet: Mapping[str, str] | None, worker: Mapping[str, str], gpus: str | None) -> dict[str, str]:
    """The agent's environment. `raylet`: that of the raylet, which has it from whoever started Ray on the node; None if
    it cannot be read: then the worker's own. `gpus`: the GPUs that are its; None: all that the node shows."""
    if raylet is None:
        raylet = {name: value for name, value in worker.items() if name not in _OF_WORKERS}
    found = {name: value for name, value in raylet.items() if not name.startswith("RAY_")}
    preload = [path for path in re.split("[ :]+", found.pop(_PRELOAD, "")) if path and "/ray/core/" not in path]
    if preload:
        found[_PRELOAD] = ":".join(preload)
    if gpus is not None:
        found[_GPUS] = gpus
    return found


def reserved_gpus(known: Sequence[Gpu], given: str | None) -> str | None:
    """UUIDs of the GPUs that were reserved. `known`: the node's; `given`: Ray's list, by the driver's numbers, None for
    none. Returns None if nothing needs to be hidden."""
    found = allotted(known, {_GPUS: given or ""})[0]
    return None if len(found) == len(known) else ",".join(gpu.uuid for gpu in found)


def parse_environment(text: bytes) -> dict[str, str]:
    """The variables in a file such as /proc/PID/environ."""
    pairs = (entry.decode(errors="surrogateescape").partition("=") for entry in text.split(b"\0") if entry)
    return {name: value for name, _, value in pairs if name}
