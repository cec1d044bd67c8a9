"""Distances between GPUs and RDMA devices: the matrix of `nvidia-smi topo -m`, from sysfs, and the best pairing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdctl import console
from pdctl.doctor import Finding, Severity
from pdctl.host.devices.pci import CLASSES, Layout
from pdctl.plan import Plan

_WORST = len(CLASSES)


@dataclass(frozen=True, slots=True)
class AffinityFacts:
    """Facts for affinity checks. `gpus`: (name, PCI address, UUID); `devices`: names of active RDMA devices."""

    gpus: tuple[tuple[str, str, str], ...]
    devices: tuple[str, ...]
    layout: Layout
    plan: Plan | None = None

    def class_of(self, pci: str, device: str) -> str:
        """The distance class, PIX to SYS; "?" if sysfs does not have it."""
        return self.layout.classes.get((pci, device), "?")


def rank(name: str) -> int:
    """The order of distance classes: 0 for the nearest; unknown counts as farthest."""
    return CLASSES.index(name) if name in CLASSES else _WORST


def pairing(facts: AffinityFacts) -> dict[str, str]:
    """GPU to RDMA device: the nearest one; among equally near ones, the one with the fewest GPUs so far."""
    load = dict.fromkeys(facts.devices, 0)
    found = {}
    for name, pci, _ in facts.gpus:
        known = [device for device in facts.devices if facts.class_of(pci, device) != "?"]
        if known:
            best = min(known, key=lambda device: (rank(facts.class_of(pci, device)), load[device]))
            load[best] += 1
            found[name] = best
    return found


def matrix(facts: AffinityFacts) -> str:
    """The matrix as a table, with the chosen pairs marked."""
    chosen = pairing(facts)
    rows = []
    for name, pci, _ in facts.gpus:
        cells = [facts.class_of(pci, device) + (" *" if chosen.get(name) == device else "") for device in facts.devices]
        node = facts.layout.nodes.get(pci, -1)
        rows.append([name, pci or "?", *cells, str(node) if node >= 0 else "?"])
    table = console.table(["", "PCI", *facts.devices, "NUMA"], rows)
    legend = (
        "PIX: at most one PCIe bridge between; PXB: several bridges; PHB: the host bridge; NODE: within a NUMA node;\n"
        "SYS: between NUMA nodes; *: the best pairing"
    )
    return f"{table}\n\n{legend}"


def check(facts: AffinityFacts) -> list[Finding]:
    """Findings for engines with an RDMA device that is not the nearest."""
    return list(_pairs(facts))


def _pairs(facts: AffinityFacts) -> Iterator[Finding]:
    addresses = {uuid: pci for _, pci, uuid in facts.gpus}
    for spec in facts.plan.processes if facts.plan else ():
        pci = addresses.get(spec.gpus[0], "") if spec.gpus else ""
        if not pci or not spec.rdma:
            continue
        has = min((facts.class_of(pci, device) for device in spec.rdma), key=rank)
        best = _nearest(facts, pci, facts.devices)
        if best is None or has == "?":
            continue
        could = facts.class_of(pci, best)
        shown = ",".join(spec.rdma)
        if rank(has) > rank(could):
            yield Finding(
                "pcie.affinity", Severity.CRITICAL if has == "SYS" else Severity.WARNING, spec.name,
                f"{shown} is {has} from its GPU {pci}", f"{best}, which is {could}", "sysfs, bus/pci/devices",
                "KV crosses more bridges than necessary, or the link between sockets",
                "remove devices from [transfer]: each engine then gets its nearest one",
            )  # fmt: skip
        else:
            yield Finding("pcie.affinity", Severity.OK, spec.name, f"{shown} is {has} from its GPU")


def _nearest(facts: AffinityFacts, pci: str, devices: Sequence[str]) -> str | None:
    known = [device for device in devices if facts.class_of(pci, device) != "?"]
    return min(known, key=lambda device: rank(facts.class_of(pci, device))) if known else None
