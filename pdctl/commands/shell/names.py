"""Names that complete a word: services, processes and groups of the service that is meant, and fixed words.

They are read from files, without a call of the supervisor: a shell waits for the answer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pdctl.commands.common import find_service, running_services
from pdctl.errors import PdctlError
from pdctl.host.users import run_root, state_root

if TYPE_CHECKING:
    from pdctl.commands.shell.slots import Slot

# A value and what it is; "" if there is nothing to say.
Named = tuple[str, str]
# The plan of a running service, in its run directory.
PLAN = "plan.json"


def services(_: Slot) -> Iterable[Named]:
    """Running services, and those that have logs."""
    running = running_services()
    yield from ((name, "running") for name in running)
    root = state_root()
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.name not in running and (folder / "logs").is_dir():
            yield folder.name, "not running"


def processes(slot: Slot) -> Iterable[Named]:
    """Processes of the service."""
    found = _processes(slot)
    return [(one["name"], _about(one)) for one in found] if found else [(name, "") for name in _logged(slot)]


def processes_and_groups(slot: Slot) -> Iterable[Named]:
    """Processes of the service, and groups of several."""
    yield from processes(slot)
    counts = _groups(slot)
    yield from ((name, f"all {count} of the group") for name, count in counts.items())


def engines(slot: Slot) -> Iterable[Named]:
    """Processes with a role: engines."""
    return [(one["name"], _about(one)) for one in _processes(slot) if one.get("role") in _ROLES]


def groups(slot: Slot) -> Iterable[Named]:
    """Groups of engines as `scale` takes them."""
    return [(f"{name}=", f"now {count}") for name, count in _groups(slot).items()]


def _groups(slot: Slot) -> dict[str, int]:
    counts: dict[str, int] = {}
    for one in _processes(slot):
        if one.get("role") in _ROLES and one.get("group"):
            counts[one["group"]] = counts.get(one["group"], 0) + 1
    return counts


def _service(slot: Slot) -> str | None:
    file = slot.chosen.get("file")
    with contextlib.suppress(PdctlError):
        return find_service(slot.chosen.get("service"), Path(file).expanduser() if file else None)
    return None


def _processes(slot: Slot) -> list[dict[str, str]]:
    """The processes in the plan of the running service: name, group, role, kind."""
    service = _service(slot)
    if service is None:
        return []
    try:
        plan = json.loads((run_root() / service / PLAN).read_bytes())
    except (OSError, ValueError):
        return []
    keys = ("name", "group", "role", "kind")
    return [{key: str(one.get(key) or "") for key in keys} for one in plan.get("processes", []) if one.get("name")]


def _logged(slot: Slot) -> list[str]:
    """Processes that have logs, of a service that does not run."""
    folder = state_root() / (_service(slot) or slot.chosen.get("service") or "pdctl") / "logs"
    return [path.stem for path in sorted(folder.glob("*.log")) if path.stem != "supervisor"]


def _about(process: Mapping[str, str]) -> str:
    return " ".join(filter(None, (process["role"], process["kind"])))


_ROLES = ("prefill", "decode", "hybrid")


def roles(_: Slot) -> Iterable[Named]:
    """The roles of engines."""
    return [(name, "") for name in _ROLES]


def areas(_: Slot) -> Iterable[Named]:
    """What the doctor checks."""
    from pdctl.doctor import Area

    return [(area.value, "") for area in Area]


def transports(_: Slot) -> Iterable[Named]:
    """How KV moves."""
    from pdctl.transports import TRANSPORTS

    return [(name, "") for name in TRANSPORTS]


def shells(_: Slot) -> Iterable[Named]:
    """Shells that have a completion script."""
    from pdctl.commands.shell.scripts import SCRIPTS

    return [(name, "") for name in SCRIPTS]


# By verb ("" for each) and parameter.
SOURCES: dict[tuple[str, str], Callable[[Slot], Iterable[Named]]] = {
    ("", "service"): services,
    ("restart", "name"): processes_and_groups,
    ("stop", "name"): processes_and_groups,
    ("start", "name"): processes_and_groups,
    ("drain", "name"): processes_and_groups,
    ("logs", "name"): processes,
    ("events", "name"): processes,
    ("why", "name"): processes,
    ("role", "name"): engines,
    ("role", "wanted"): roles,
    ("scale", "groups"): groups,
    ("doctor", "words"): areas,
    ("", "only"): transports,
    ("completion", "shell"): shells,
}
