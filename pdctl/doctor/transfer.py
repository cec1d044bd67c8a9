"""Time each transport between two temporary processes, placed where a plan's engines will be.

Each probe runs in its own process, which loads the transport's library. It does not touch a running service, but it
uses memory and the network."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from pdctl.errors import PdctlError
from pdctl.host import program
from pdctl.host.devices.rdma import RdmaTree
from pdctl.plan import Plan, ProcessSpec
from pdctl.plan.interpreter import interpreter_of
from pdctl.transports import TRANSPORTS

PROTOCOLS = ("auto", "tcp", "rdma")
# Starting two processes, loading a library and moving the bytes takes seconds; after this time, something hangs.
_PROBE_S = 120.0
# Allows for moving the bytes about twenty times at 200 MB/s.
_PER_MIB_S = 0.1
_MOST_SAID = 2000

# A probe's result, as parsed JSON.
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Probe:
    """One transport between two locations. `python`: the interpreter with the engine; `pair`: the engines' names, ""
    without a plan; empty `cpus` mean any. `pieces`: additional measurements with all bytes split into this many pieces.
    """

    python: str
    transport: str
    protocol: str
    mib: int
    pair: str = ""
    cpus: tuple[int, ...] = ()
    peer_cpus: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    peer_devices: tuple[str, ...] = ()
    pieces: tuple[int, ...] = ()

    def argv(self) -> list[str]:
        """The command line of the probe."""
        words = ["probe", "--transport", self.transport, "--protocol", self.protocol, "--mib", str(self.mib)]
        for name, values in (
            ("--cpus", self.cpus), ("--peer-cpus", self.peer_cpus), ("--devices", self.devices),
            ("--peer-devices", self.peer_devices), ("--pieces", self.pieces),
        ):  # fmt: skip
            words += [name, ",".join(map(str, values))] if values else []
        return program.engine(self.python, *words)


def probes(plan: Plan | None, only: str | None, protocol: str, mib: int) -> list[Probe]:
    """One probe per transport and per pair of locations between which the plan hands over KV. Raises PdctlError."""
    python = interpreter_of(plan, "timing transfers")
    names = [only] if only else [name for name, info in TRANSPORTS.items() if not info.on_gpu]
    if plan is None:
        return [Probe(python, name, protocol, mib) for name in names]
    places: dict[tuple[object, ...], Probe] = {}
    for prefill in _with_role(plan, "decode"):
        for decode in _with_role(plan, "prefill"):
            if prefill.name == decode.name:
                continue
            for name in names:
                pair = f"{prefill.name} to {decode.name}"
                probe = Probe(python, name, protocol, mib, pair, decode.cpus, prefill.cpus, decode.rdma, prefill.rdma)
                # Replicas in the same location need no further probe.
                places.setdefault((name, probe.cpus, probe.peer_cpus, probe.devices, probe.peer_devices), probe)
    return list(places.values()) or [Probe(python, name, protocol, mib) for name in names]


def _with_role(plan: Plan, other: str) -> list[ProcessSpec]:
    """Engines that do not have the `other` role."""
    return [spec for spec in plan.processes if spec.is_engine and spec.role != other]


def run(probe: Probe, tree: RdmaTree | None = None) -> Result:
    """The probe's measurements, or `error`. Raises PdctlError if the engine's packages are not installed."""
    limit = (_PROBE_S + probe.mib * _PER_MIB_S) * (1 + len(probe.pieces) / 2)
    try:
        done = subprocess.run(
            probe.argv(), capture_output=True, text=True, errors="replace", timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return _about(probe, {"error": f"no result within {limit:.0f} s"})
    try:
        found = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        if "ModuleNotFoundError" in done.stderr:
            hint = "install the engine's packages: pip install 'pdctl[engine]'"
            raise PdctlError(f"the probe cannot run: {done.stderr.strip().splitlines()[-1]}", hint) from None
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return _about(probe, {"error": lines[-1]})
    assert isinstance(found, dict)
    if "error" in found and (said := done.stderr.strip()):
        # Messages of the peer, and of libraries that only write to stderr.
        found["said"] = said[-_MOST_SAID:]
    link = _link_gbps(probe, found, tree)
    return _about(probe, {**found, "link_gbps": link, "of_link": round(found["gbps"] / link, 3) if link else None})


def _about(probe: Probe, found: Result) -> Result:
    return {"transport": probe.transport, "pair": probe.pair, **found}


def _link_gbps(probe: Probe, found: Result, tree: RdmaTree | None) -> float | None:
    """GB/s of the slowest RDMA link used; None for other protocols."""
    if tree is None or found.get("protocol") != "rdma":
        return None
    names = {*probe.devices, *probe.peer_devices}
    named = [device for device in tree.devices if not names or device.name in names]
    rates = [port.rate.gbps for device in named for port in device.ports if port.state == "ACTIVE" and port.rate]
    return min(rates) / 8 if rates else None


def exit_code(found: list[Result], needed: str = "") -> int:
    """0: all bytes correct; 1: a fallback was used; 2: wrong bytes, no transport works, or the `needed` one fails."""
    if any(entry["transport"] == needed and "error" in entry for entry in found):
        return 2
    works = [entry for entry in found if "error" not in entry]
    if not works or not all(entry["bytes_right"] for entry in works):
        return 2
    return 1 if any(entry["fallback"] for entry in works) else 0
