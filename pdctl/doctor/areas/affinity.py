"""Which RDMA device is nearest to which GPU: the matrix of `nvidia-smi topo -m`, from sysfs, and the best pairing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdctl import console
from pdctl.doctor import Finding, Severity
from pdctl.host.pci import CLASSES, Layout
from pdctl.plan import Plan

_WORST = len(CLASSES)


@dataclass(frozen=True, slots=True)
class AffinityFacts:
    """`gpus`: (name, PCI address, UUID); `devices`: names of RDMA devices that are up."""

    gpus: tuple[tuple[str, str, str], ...]
    devices: tuple[str, ...]
    layout: Layout
    plan: Plan | None = None

    def class_of(self, pci: str, device: str) -> str:
        """PIX to SYS; "?" where sysfs does not tell."""
        return self.layout.classes.get((pci, device), "?")


def rank(name: str) -> int:
    """0 for the nearest; what is not known is far."""
    return CLASSES.index(name) if name in CLASSES else _WORST


def pairing(facts: AffinityFacts) -> dict[str, str]:
    """GPU to RDMA device: the nearest, and of equally near ones that which has the fewest GPUs already."""
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
    """As a table, the chosen pair marked."""
    chosen = pairing(facts)
    rows = []
    for name, pci, _ in facts.gpus:
        cells = [facts.class_of(pci, device) + (" *" if chosen.get(name) == device else "") for device in facts.devices]
        node = facts.layout.nodes.get(pci, -1)
        rows.append([name, pci or "?", *cells, str(node) if node >= 0 else "?"])
    table = console.table(["", "PCI", *facts.devices, "NUMA"], rows)
    legend = (
        "PIX: at most one PCIe bridge between; PXB: several; PHB: the host bridge; NODE: within a NUMA node;\n"
        "SYS: between NUMA nodes; *: the best pairing"
    )
    return f"{table}\n\n{legend}"


def check(facts: AffinityFacts) -> list[Finding]:
    """What a plan pairs worse than it could."""
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
                "KV crosses more bridges, or the sockets' link, than it must",
                "leave devices out of [transfer]: each engine gets its nearest",
            )  # fmt: skip
        else:
            yield Finding("pcie.affinity", Severity.OK, spec.name, f"{shown} is {has} from its GPU")


def _nearest(facts: AffinityFacts, pci: str, devices: Sequence[str]) -> str | None:
    known = [device for device in devices if facts.class_of(pci, device) != "?"]
    return min(known, key=lambda device: rank(facts.class_of(pci, device))) if known else None
