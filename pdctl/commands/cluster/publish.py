"""`pdctl up`, `apply` and `down` in a cluster: the topology is published through this node's agent, and every agent
follows it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pdctl import console
from pdctl.commands.common import as_json_text, control, is_interactive, topology_file
from pdctl.commands.control.apply import show_changes
from pdctl.errors import AlreadyRunning, NotAnswering, NotRunning, PdctlError, ServiceFailed
from pdctl.user_files import read_user_text

if TYPE_CHECKING:
    from pdctl.control_api import NodeChanges, ProcessStatus, PublishedTopology, ServiceStatus, TopologyReply

# Each look asks every node.
_POLL_S = 0.5
# Nodes that do nothing for so long, and are not as they should be, will not be: seconds.
_STUCK_S = 15.0
# For agents that have just been started to register, seconds.
_REGISTER_S = 60.0


def up(path: Path, service: str, wait_s: float) -> None:
    """Publish a file and wait until everything is ready. Raises PdctlError, ServiceFailed."""
    text, source = _checked(path)
    _launch(service, text, source)
    try:
        published = control(service).topology()
    except NotRunning:
        hint = f"start one with: pdctl agent -f {path}"
        raise PdctlError(f"no agent of service {service!r} runs on this machine", hint) from None
    if published.text and published.text != text:
        told = f"service {service!r} is already up, with another topology from {published.source}"
        raise AlreadyRunning(told, f"change it with: pdctl apply -f {path}")
    waiting = _Waiting(service, text, source, None)
    if not published.text:
        _publish(service, text, source, published, _previewed(service, text, source, published, as_json=False))
    status = waiting.until_done(wait_s)
    console.out(f"{service} is ready at {', '.join(status.proxy_urls) or 'no proxy'}")


def apply_file(service: str, file: Path | None, dry_run: bool, as_json: bool, wait_s: float) -> None:
    """Publish an edited file. Raises PdctlError, ServiceFailed."""
    published = control(service).topology()
    source = Path(published.source)
    if file is None and not (published.source and source.is_file()):
        raise PdctlError("no topology file is named, and the published one is not on this machine", "name it with -f")
    change(service, *_checked(file or source), published, dry_run, as_json, wait_s)


def change(
    service: str,
    text: str,
    source: str,
    published: PublishedTopology,
    dry_run: bool,
    as_json: bool,
    wait_s: float,
) -> None:
    """Print what a topology changes, publish it and wait. Raises PdctlError, ServiceFailed."""
    reply = _previewed(service, text, source, published, as_json)
    if dry_run or (text == published.text and all(_is_empty(one) for one in reply.nodes)):
        return
    changed = {f"{one.node}/{name}" for one in reply.nodes for name in (*one.added, *one.restarted)}
    # What has failed before is not this change's fault.
    waiting = _Waiting(service, text, source, changed)
    _publish(service, text, source, published, reply)
    waiting.until_done(wait_s)
    console.note("applied")


def down(service: str, wait_s: float) -> None:
    """Let the cluster run nothing, and wait until nothing runs. Raises PdctlError."""
    control(service).withdraw()
    deadline, shown = time.monotonic() + wait_s, ""
    while True:
        status = control(service).status(measurements=False)
        if not status.processes:
            break
        line = f"stopping {', '.join(process.name for process in status.processes)}"
        if line != shown:
            shown = line
            console.note(line)
        if time.monotonic() > deadline:
            raise PdctlError(f"service {service!r} is still stopping", f"see: pdctl status -s {service}")
        time.sleep(_POLL_S)
    for node in status.nodes:
        if node.state == "silent":
            console.note(f"node {node.name} does not answer: it stops what it runs when it hears etcd again")


def give_back(service: str, file: Path | None) -> bool:
    """End the agents if a launcher has started them: their file, or else that of the command, names it. Raises
    PdctlError."""
    from pdctl import launchers
    from pdctl.launchers.node import file_of
    from pdctl.topology.loader import load_imagined

    path = next((path for path in (file_of(service), topology_file(file)) if path is not None and path.is_file()), None)
    return path is not None and launchers.give_back(load_imagined(path), console.note)


# -- parts -------------------------------------------------------------------------------------------------


def _launch(service: str, text: str, source: str) -> None:
    """Get agents onto the nodes, and wait until this node's knows them all. Raises PdctlError."""
    from pdctl import launchers
    from pdctl.topology.loader import load_cluster_text

    nodes = launchers.start(load_cluster_text(text, source), console.note)
    deadline = time.monotonic() + _REGISTER_S
    while nodes:
        try:
            known = {node.name for node in control(service).status(measurements=False).nodes if node.state != "silent"}
        except (NotRunning, NotAnswering):
            known = set()
        if known.issuperset(nodes):
            return
        if time.monotonic() > deadline:
            late = ", ".join(node for node in nodes if node not in known)
            raise PdctlError(
                f"agents run, but this node does not know of: {late}", "do they reach etcd? see their logs"
            )
        time.sleep(_POLL_S)


def _checked(path: Path) -> tuple[str, str]:
    """The text of a file that a cluster may run, and its path. Raises ConfigError with every problem, PdctlError."""
    from pdctl.topology.loader import load_cluster_text

    try:
        text = read_user_text(path)
    except FileNotFoundError:
        raise PdctlError(f"topology file {path} does not exist", "create one with: pdctl init") from None
    except (OSError, UnicodeDecodeError) as failure:
        raise PdctlError(f"topology file {path} cannot be read: {failure}") from None
    source = str(path.absolute())
    if load_cluster_text(text, source).cluster is None:
        raise PdctlError(f"{path} has no [cluster], but its service runs in one", "add the table; see docs/cluster.md")
    return text, source


def _previewed(service: str, text: str, source: str, published: PublishedTopology, as_json: bool) -> TopologyReply:
    """Print what a topology changes. Raises PdctlError if a node refuses it."""
    reply = _ask(service, text, source, published.revision)
    if as_json:
        console.out(as_json_text(reply))
    else:
        _show(reply.nodes)
    if refused := [one.unknown for one in reply.nodes if one.refused]:
        raise PdctlError("; ".join(refused), "nothing was published")
    return reply


def _ask(service: str, text: str, source: str, revision: int | None = None) -> TopologyReply:
    """What a topology changes. Raises PdctlError."""
    from pdctl.control_api import TopologyOrder

    return control(service).publish(TopologyOrder(text=text, source=source, revision=revision, dry_run=True))


def _publish(service: str, text: str, source: str, published: PublishedTopology, reply: TopologyReply) -> None:
    from pdctl.control_api import TopologyOrder

    control(service).publish(TopologyOrder(text=text, source=source, revision=published.revision))
    console.note(f"published to {', '.join(one.node for one in reply.nodes)}")


def _show(nodes: Sequence[NodeChanges]) -> None:
    """Print what changes on each node."""
    for one in nodes:
        if one.unknown and not one.refused:
            console.out(f"? {one.node}: not known: {one.unknown}")
        elif not one.refused:
            show_changes(one, f"{one.node}/")


def _is_empty(one: NodeChanges) -> bool:
    return not (one.added or one.removed or one.restarted or one.live or one.refused)


class _Waiting:
    """Waits until a cluster runs what is published. `changed`: processes, as NODE/NAME, that must be ready; None for
    all."""

    def __init__(self, service: str, text: str, source: str, changed: Collection[str] | None) -> None:
        self._service = service
        self._text = text
        self._source = source
        self._changed = changed
        self._shown = ""
        self._moved_at = time.monotonic()
        self._failed_before = _failed(self._status()) if changed is not None else set[str]()

    def until_done(self, wait_s: float) -> ServiceStatus:
        """Print progress until it is done. Raises ServiceFailed if it will not be, or not in time."""
        deadline = time.monotonic() + wait_s
        while True:
            status = control(self._service).status(measurements=False)
            self._show(status)
            if self._is_ready(status) and self._runs_it(status) and self._is_ready(status := self._status()):
                self._end(status)
                return status
            self._check(status)
            if time.monotonic() > deadline:
                raise ServiceFailed(
                    f"not ready after {wait_s:g} s: {self._shown or status.state}",
                    "the nodes go on with it; see: pdctl status",
                )
            time.sleep(_POLL_S)

    def _status(self) -> ServiceStatus:
        return control(self._service).status(measurements=False)

    def _is_ready(self, status: ServiceStatus) -> bool:
        """Whether nothing is under way, and what must be ready is."""
        wanted = [process for process in status.processes if self._is_wanted(process)]
        under_way = status.apply is not None and status.apply.state == "running"
        return not under_way and not status.unplaced and all(process.state == "ready" for process in wanted)

    def _is_wanted(self, process: ProcessStatus) -> bool:
        if self._changed is None:
            return True
        bare = process.name.removeprefix(f"{process.node}/")
        return f"{process.node}/{bare}" in self._changed

    def _runs_it(self, status: ServiceStatus) -> bool:
        """Whether no node has anything to change any more. One that is silent is not waited for."""
        silent = {node.name for node in status.nodes if node.state == "silent"}
        nodes = _ask(self._service, self._text, self._source).nodes
        return all(_is_empty(one) and (not one.unknown or one.node in silent) for one in nodes)

    def _show(self, status: ServiceStatus) -> None:
        line = "  ".join(_where(process) for process in status.processes if process.state != "ready")
        line = line or (f"no node runs {', '.join(status.unplaced)} yet" if status.unplaced else "")
        if status.apply is not None and status.apply.state == "running":
            line = "  ".join(filter(None, (status.apply.step, line)))
            self._moved_at = time.monotonic()
        if line != self._shown:
            self._moved_at = time.monotonic()
            self._shown = line
            if line:
                console.note(f"\r\x1b[K{line}" if is_interactive() else line, end="" if is_interactive() else "\n")

    def _check(self, status: ServiceStatus) -> None:
        """Raise ServiceFailed for what will not mend itself."""
        if new := _failed(status) - self._failed_before:
            name = min(new)
            self._end(status)
            raise ServiceFailed(f"{', '.join(sorted(new))} failed", f"see the cause with: pdctl why {name}")
        if time.monotonic() - self._moved_at < _STUCK_S or _is_starting(status):
            return
        apply_error = status.apply.error if status.apply is not None and status.apply.state == "failed" else ""
        if reason := status.refused or apply_error:
            self._end(status)
            raise ServiceFailed(f"not carried out: {reason}", "see: pdctl status, pdctl events")

    def _end(self, status: ServiceStatus) -> None:
        if is_interactive() and self._shown:
            console.note("")
        for node in status.nodes:
            if node.state == "silent":
                console.note(f"node {node.name} does not answer: {node.reason}")


def _failed(status: ServiceStatus) -> set[str]:
    return {process.name for process in status.processes if process.state == "failed"}


def _is_starting(status: ServiceStatus) -> bool:
    return any(process.state in ("starting", "pending", "backoff", "clearing") for process in status.processes)


def _where(process: ProcessStatus) -> str:
    place = "" if "/" in process.name else f" on {process.node}"
    phase = f", {process.phase}" if process.phase else ""
    reason = f" ({process.reason})" if process.reason else ""
    return f"{process.name}{place}: {process.state}{phase}{reason}"
