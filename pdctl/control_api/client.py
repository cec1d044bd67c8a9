"""A client of the control API: HTTP over the unix socket in a service's run directory, with one method per call."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, overload
from urllib.parse import quote, urlencode

import msgspec

from pdctl.control_api.cluster_messages import PublishedTopology, TopologyOrder
from pdctl.control_api.examination_messages import (
    ClusterExamination,
    ExamineOrder,
    TransferOrder,
    TransferResult,
)
from pdctl.control_api.messages import (
    HEARTBEAT_S,
    DashboardOrder,
    DashboardReply,
    Event,
    Exits,
    MeasuredStatus,
    Node,
    Nodes,
    Reply,
    RoleName,
    RoleOrder,
    ServiceStatus,
    Stopping,
    TopologyReply,
    UpgradeOrder,
    Verb,
)
from pdctl.control_api.usage_messages import KeysStatus, KvStatus, LogNames, LogPart
from pdctl.errors import NotAnswering, NotRunning, PdctlError
from pdctl.host.processes.presence import is_stopped, left_running, living_services, supervisor_of

if TYPE_CHECKING:
    from pdctl.plan import Plan
    from pdctl.plan.changes import Changes

Answer = TypeVar("Answer")

SOCKET = "control.sock"
_TOPOLOGY = "/v1/cluster/topology"
# Timeout of one call to a supervisor, seconds.
_CALL_S = 10.0
# The same for a change of a cluster's topology, about which every node is asked.
_PUBLISH_S = 30.0
# The other version is tried first, which has 30 s.
_UPGRADE_S = 45.0
# For an inspection of all nodes, and for a transfer between two of them.
_EXAMINE_S, _TRANSFER_S = 75.0, 200.0
# Within _SOCKET_S seconds, a supervisor that starts has a socket, and one whose socket was removed has it again.
_SOCKET_S, _LOOK_S = 5.0, 0.05
# An event stream that is silent for longer counts as dead, seconds.
_SILENT_S = 3 * HEARTBEAT_S


class ControlClient:
    """Calls the supervisor of one service.

    Every method raises NotRunning if no supervisor is alive, NotAnswering if one is alive but does not answer, and
    PdctlError if it belongs to another user or refuses the call.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    @overload
    def status(self, measurements: Literal[True] = ...) -> MeasuredStatus: ...
    @overload
    def status(self, measurements: Literal[False]) -> ServiceStatus: ...
    def status(self, measurements: bool = True) -> ServiceStatus:
        """The service and its processes. Measurements call every engine, so do not poll for a state with them."""
        if measurements:
            return self._ask("GET", "/v1/status", MeasuredStatus)
        return self._ask("GET", "/v1/status?measurements=0", ServiceStatus)

    def plan(self) -> Plan:
        """The running plan."""
        # Imported here, because most calls do not need it and every command imports this module.
        from pdctl.plan import Plan

        return self._ask("GET", "/v1/plan", Plan)

    def exits(self) -> Exits:
        """The last exits of this run."""
        return self._ask("GET", "/v1/exits", Exits)

    def keys(self) -> KeysStatus:
        """The API keys: their settings, and what each has and had."""
        return self._ask("GET", "/v1/keys", KeysStatus)

    def leases(self) -> KvStatus:
        """All leases on KV, and the use of the blocks."""
        return self._ask("GET", "/v1/kv", KvStatus)

    def revoke(self, lease_id: str) -> Reply:
        """Revoke a lease. The reply has the reason if this failed."""
        return self._ask("POST", f"/v1/kv/revoke?{urlencode({'lease': lease_id})}", Reply)

    def act(self, process: str, verb: Verb, drain: bool = False) -> None:
        """Start, stop, restart or drain a process, without waiting for the result. `drain`: let its requests finish
        first."""
        self._do(f"/v1/processes/{quote(process, safe='')}/{verb}" + ("?drain=1" if drain else ""))

    def change_role(self, process: str, role: RoleName, drain_s: float | None = None, dry_run: bool = False) -> None:
        """Give an engine another role, without waiting for the end of what it has. `drain_s`: answers that run longer
        go on at other engines, None: as configured."""
        order = RoleOrder(role=role, drain_s=drain_s, dry_run=dry_run)
        self._do(f"/v1/processes/{quote(process, safe='')}/role", msgspec.json.encode(order))

    def changes(self, wanted: Plan) -> Changes:
        """The changes that `apply` would make."""
        from pdctl.plan.changes import Changes

        return self._ask("POST", "/v1/apply?dry_run=1", Changes, msgspec.json.encode(wanted))

    def apply(self, wanted: Plan) -> None:
        """Start to apply a plan. The status shows the progress."""
        self._do("/v1/apply", msgspec.json.encode(wanted))

    def upgrade(self, program: list[str], wanted: Plan) -> None:
        """Have the supervisor become this program, which applies the plan. It does not answer meanwhile."""
        order = UpgradeOrder(tuple(program), msgspec.Raw(msgspec.json.encode(wanted)))
        self._do("/v1/upgrade", msgspec.json.encode(order), within_s=_UPGRADE_S)

    def nodes(self) -> Nodes:
        """The engines that registered themselves, with their load."""
        return self._ask("GET", "/v1/nodes", Nodes)

    def add_node(self, node: Node) -> Reply:
        """Make an engine a member of the service. The reply has the reason if it is refused."""
        return self._ask("POST", "/v1/nodes/add", Reply, msgspec.json.encode(node))

    def remove_node(self, name: str) -> Reply:
        """Let an engine that registered itself finish its requests, and forget it. Does not wait for that."""
        return self._ask("POST", f"/v1/nodes/remove?{urlencode({'name': name})}", Reply)

    def dashboard(self, listen: str = "", write: bool = False, stop: bool = False) -> str:
        """Open the live page and return its link, "" for one that is closed. `listen`: a loopback address, or "";
        `write`: the link may change the service."""
        order = msgspec.json.encode(DashboardOrder(listen=listen, write=write, stop=stop))
        reply = self._ask("POST", "/v1/dashboard", DashboardReply, order)
        return reply.url

    def log_names(self) -> LogNames:
        """The processes that have logs, by node."""
        return self._ask("GET", "/v1/logs", LogNames)

    def log_part(self, name: str, place: str, previous: bool = False, last: int = 0) -> LogPart:
        """A piece of a log, in a cluster of NODE/NAME: what follows `place`; for "" the last `last` bytes, or with
        `previous` everything from the oldest start on that is kept."""
        query = urlencode({"after": place, "previous": int(previous), "last": last})
        return self._ask("GET", f"/v1/logs/{quote(name, safe='')}?{query}", LogPart)

    def topology(self) -> PublishedTopology:
        """The topology that the cluster runs."""
        return self._ask("GET", _TOPOLOGY, PublishedTopology)

    def publish(self, order: TopologyOrder) -> TopologyReply:
        """Let the cluster run a topology, without waiting for it; or only say what it would change."""
        return self._ask("POST", _TOPOLOGY, TopologyReply, msgspec.json.encode(order), _PUBLISH_S)

    def withdraw(self) -> None:
        """Let the cluster run nothing, without waiting for that."""
        self._do(_TOPOLOGY, method="DELETE")

    def examine(self, order: ExamineOrder) -> ClusterExamination:
        """Let every node of the cluster inspect itself."""
        return self._ask("POST", "/v1/doctor", ClusterExamination, msgspec.json.encode(order), _EXAMINE_S)

    def transfer(self, order: TransferOrder) -> TransferResult:
        """Let one node of the cluster read from another, and time that."""
        return self._ask("POST", "/v1/doctor/transfer", TransferResult, msgspec.json.encode(order), _TRANSFER_S)

    def stop(self) -> None:
        """Stop the service. A second call kills the remaining processes."""
        self._ask("POST", "/v1/stop", Stopping)

    def events(self, cursor: str = "", follow: bool = True) -> Generator[Event, None, None]:
        """Yield the events after `cursor`, oldest first, and then, with `follow`, new ones. With "", starts at the
        oldest kept event.

        Ends when the supervisor ends the stream: because it stops, or because we read too slowly. To resume, pass the
        cursor of the last event.
        """
        query = {**({"after": cursor} if cursor else {}), **({} if follow else {"follow": "0"})}
        path = "/v1/events" + (f"?{urlencode(query)}" if query else "")
        connection, answer = self._send("GET", path, None, _SILENT_S)
        try:
            if answer.status != 200:
                raise _refusal(answer.read())
            yield from _events(answer)
        except (OSError, http.client.HTTPException, ValueError):
            raise self._gone_or_silent() from None
        finally:
            connection.close()

    # -- parts ---------------------------------------------------------------------------------------------

    def _do(self, path: str, body: bytes | None = None, method: str = "POST", within_s: float = _CALL_S) -> None:
        reply = self._ask(method, path, Reply, body, within_s)
        if not reply.ok:
            raise PdctlError(reply.reason, reply.hint or None)

    def _ask(
        self, method: str, path: str, kind: type[Answer], body: bytes | None = None, within_s: float = _CALL_S
    ) -> Answer:
        connection, answer = self._send(method, path, body, within_s, within_s)
        try:
            data = answer.read()
            # A refused call has a Reply as its body, whatever its usual answer is.
            if answer.status == 409 and kind is not Reply:
                raise _refusal(data)
            return msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError as failure:
            raise self._of_another_version(failure) from None
        except (OSError, http.client.HTTPException, ValueError):
            raise self._gone_or_silent() from None
        finally:
            connection.close()

    def _send(
        self, method: str, path: str, body: bytes | None, silent_s: float, head_s: float = _CALL_S
    ) -> tuple[_UnixConnection, http.client.HTTPResponse]:
        """Send a request and return its connection and answer. `silent_s`: timeout of each read of the body, `head_s`
        of what comes before."""
        deadline = time.monotonic() + _SOCKET_S
        while True:
            connection = _UnixConnection(self._run_dir / SOCKET, head_s)
            try:
                connection.request(method, path, body)
                answer = connection.getresponse()
                if connection.sock is not None:  # None if the connection ends with this answer; then the timeout stays
                    connection.sock.settimeout(silent_s)
                return connection, answer
            except PermissionError:
                connection.close()
                told = f"service {self._run_dir.name!r} belongs to another user ({self._run_dir})"
                raise PdctlError(told, "run pdctl as that user") from None
            except (FileNotFoundError, ConnectionRefusedError):
                # Without a socket, the supervisor may still be alive: it restores a socket that was removed.
                connection.close()
                if (pid := supervisor_of(self._run_dir)) is None:
                    raise self._not_running() from None
                if time.monotonic() > deadline:
                    raise not_answering(self._run_dir.name, pid) from None
                time.sleep(_LOOK_S)
            except (OSError, http.client.HTTPException, ValueError):
                connection.close()
                raise self._gone_or_silent() from None

    def _gone_or_silent(self) -> PdctlError:
        pid = supervisor_of(self._run_dir)
        return not_answering(self._run_dir.name, pid) if pid is not None else self._not_running()

    def _not_running(self) -> NotRunning:
        service = self._run_dir.name
        others = [name for name in living_services(self._run_dir.parent) if name != service]
        hint = f"running: {', '.join(others)}; choose one with -s" if others else "start it with: pdctl up"
        if others or not left_running(self._run_dir):
            return NotRunning(f"service {service!r} is not running", hint)
        hint = "take over its processes with: pdctl up    or stop them with: pdctl down"
        return NotRunning(f"the supervisor of service {service!r} is gone", hint)

    def _of_another_version(self, failure: msgspec.ValidationError) -> PdctlError:
        hint = "it may have another version than this pdctl; restart the service with this version"
        return PdctlError(f"the supervisor of service {self._run_dir.name!r} gave an unknown answer: {failure}", hint)


def not_answering(service: str, pid: int) -> NotAnswering:
    """The error for a supervisor that is alive but does not answer."""
    end = f"end the service with: pdctl down --now -s {service}"
    if is_stopped(pid):
        hint = f"resume it with: kill -CONT {pid}    or {end}"
        return NotAnswering(f"the supervisor of service {service!r} (pid {pid}) was stopped by a signal", hint)
    return NotAnswering(f"the supervisor of service {service!r} (pid {pid}) is running but does not answer", end)


def _refusal(data: bytes) -> PdctlError:
    """Why a call was refused."""
    reply = msgspec.json.decode(data, type=Reply)
    return PdctlError(reply.reason, reply.hint or None)


def _events(lines: Iterable[bytes]) -> Iterator[Event]:
    """Parse server-sent events, see https://html.spec.whatwg.org/multipage/server-sent-events.html. Each is an id, one
    line of data and an empty line, with comments between events."""
    cursor = data = ""
    for line in lines:
        name, _, value = line.decode().rstrip("\r\n").partition(": ")
        if name == "id":
            cursor = value
        elif name == "data":
            data = value
        elif not name and data:
            yield event_of(cursor, data)
            data = ""


def event_of(cursor: str, line: str | bytes) -> Event:
    """Parse one line of the journal."""
    known = {"at": "", "process": "", "event": "", "message": "", "node": ""}
    detail = msgspec.json.decode(line, type=dict[str, object])
    for name in known:
        known[name] = str(detail.pop(name, ""))
    return Event(cursor=cursor, detail=detail, **known)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, within_s: float) -> None:
        super().__init__("localhost", timeout=within_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
