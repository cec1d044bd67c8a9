"""`pdctl scale` in a cluster: the published topology with other numbers of replicas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pdctl.commands.cluster.publish import change
from pdctl.commands.common import control
from pdctl.errors import PdctlError
from pdctl.topology.toml_lines import key_lines

if TYPE_CHECKING:
    from pdctl.topology.spec import Topology

_REPLICAS = re.compile(r"(\s*replicas\s*=\s*)[0-9_]+")


def scale_published(service: str, counts: Mapping[str, int], dry_run: bool, as_json: bool, wait_s: float) -> None:
    """Publish the topology with these numbers, by group. Raises PdctlError, ServiceFailed."""
    published = control(service).topology()
    if not published.text:
        raise PdctlError(f"no topology of service {service!r} is published", "publish one with: pdctl up -f FILE")
    text = with_replicas(published.text, published.source, counts)
    change(service, text, published.source, published, dry_run, as_json, wait_s)


def with_replicas(text: str, source: str, counts: Mapping[str, int]) -> str:
    """A topology's text with other numbers of replicas; everything else stays as it was written. Raises PdctlError."""
    from pdctl.topology.loader import load_cluster_text

    topology = load_cluster_text(text, source)
    known = {group.name: number for number, group in enumerate(topology.engines) if not group.is_attached}
    for group in counts:
        if group not in known:
            raise PdctlError(f"pdctl starts no engine group {group!r}", f"known: {', '.join(known)}")
    for group, count in counts.items():
        # `data_parallel` may make several engines of each replica.
        each = _counts(load_cluster_text(_with_count(text, known[group], 1), source))[group]
        if count % each:
            raise PdctlError(f"each replica of {group} is {each} engines", f"for example: pdctl scale {group}={each}")
        text = _with_count(text, known[group], count // each)
    # A text that is written in another way than usual may be changed in the wrong place, or not at all.
    if _counts(load_cluster_text(text, source)) != _counts(topology) | dict(counts):
        hint = "edit replicas in the file, then: pdctl apply -f FILE"
        raise PdctlError(f"replicas cannot be changed in the text of {source}", hint)
    return text


def _with_count(text: str, number: int, count: int) -> str:
    """The text with the replicas of the engine group of that number."""
    places, lines = key_lines(text), text.splitlines(keepends=True)
    if (place := places.get(("engines", number, "replicas"))) is not None:
        lines[place - 1] = _REPLICAS.sub(rf"\g<1>{count}", lines[place - 1], count=1)
    elif (place := places.get(("engines", number))) is not None:
        lines[place - 1] = lines[place - 1].rstrip("\r\n") + "\n"
        lines.insert(place, f"replicas = {count}\n")
    return "".join(lines)


def _counts(topology: Topology) -> dict[str, int]:
    return {group.name: group.replicas for group in topology.engines}
