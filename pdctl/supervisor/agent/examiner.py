"""What a node does for `pdctl doctor`: it inspects itself and takes part in transfers, each in a process of its own.

Nothing of a command line comes from the network: what other nodes say is checked, and goes to the process by its stdin.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec

from pdctl.control_api.examination_messages import ExamineOrder, NodeReport, ReadOrder, ServeOrder, TransferResult
from pdctl.errors import ConfigError, PdctlError
from pdctl.host import program
from pdctl.host.processes.subprocesses import last_line, last_words, started
from pdctl.plan import Plan
from pdctl.plan.interpreter import interpreter_of
from pdctl.supervisor.agent.plans import commands_in
from pdctl.topology.loader import parse_text
from pdctl.topology.spec import Cluster

_REPORT_S = 45.0
# A probe loads its transport's library before it tells its address.
_ADDRESS_S = 60.0
_READ_S = 150.0
# An examination waits so long for another one.
_TURN_S = 60.0
_MOST_BYTES = 16 * 2**20
_ADDRESS = re.compile(r"[!-~]{1,65536}")


class _Task(msgspec.Struct, frozen=True):
    """As pdctl/doctor/__main__.py reads it."""

    node: str
    address: str
    cluster: Cluster
    engines: frozenset[str]
    text: str
    source: str


class Examiner:
    """See Examining. `plan` returns what runs here."""

    def __init__(
        self, node: str, address: str, cluster: Cluster, allow_commands: bool, plan: Callable[[], Plan]
    ) -> None:
        self._node = node
        self._address = address
        self._cluster = cluster
        self._allow_commands = allow_commands
        self._plan = plan
        self._turn = asyncio.Lock()

    async def report(self, order: ExamineOrder) -> NodeReport:
        """See Examining."""
        if order.text and not self._allow_commands and (named := _commands(order)):
            hint = "start the agent with --allow-commands if everyone who has the secret may run commands here"
            raise PdctlError(f"the topology sets {named}: this agent starts only what pdctl starts itself", hint)
        engines = frozenset(spec.name for spec in self._plan().processes if spec.is_engine)
        task = _Task(self._node, self._address, self._cluster, engines, order.text, order.source)
        async with self._alone():
            out = await _output(program.part("pdctl.doctor"), msgspec.json.encode(task), _REPORT_S)
        try:
            return msgspec.json.decode(out, type=NodeReport)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            raise PdctlError(f"the doctor's report is not understood: {failure}") from failure

    @asynccontextmanager
    async def serving(self, order: ServeOrder) -> AsyncIterator[str]:
        """See Examining."""
        async with started([*self._probe(order), "--serve"], _MOST_BYTES) as process:
            assert process.stdout is not None
            try:
                async with asyncio.timeout(_ADDRESS_S):
                    while line := (await process.stdout.readline()).decode(errors="replace"):
                        if line.startswith("ADDRESS "):
                            break
            except TimeoutError:
                raise PdctlError(f"{order.transport} did not open within {_ADDRESS_S:g} s") from None
            if not line:
                raise PdctlError(f"{order.transport} cannot serve here: {await last_words(process)}")
            yield line.split()[1]

    async def read(self, order: ReadOrder) -> TransferResult:
        """See Examining."""
        if not _ADDRESS.fullmatch(order.address):
            raise PdctlError("the address to read from is malformed")
        async with self._alone():
            argv = [*self._probe(order), "--from-stdin"]
            out = await _output(argv, f"{order.address}\n".encode(), _READ_S, told_on_failure=True)
        try:
            return msgspec.json.decode(out.strip().rpartition(b"\n")[2], type=TransferResult)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            raise PdctlError(f"the probe's result is not understood: {failure}") from failure

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """One after the other: measurements must not disturb each other. Raises PdctlError."""
        try:
            async with asyncio.timeout(_TURN_S):
                await self._turn.acquire()
        except TimeoutError:
            message = f"this node was busy with another examination for {_TURN_S:g} s"
            raise PdctlError(message, "try again later") from None
        try:
            yield
        finally:
            self._turn.release()

    def _probe(self, order: ServeOrder) -> list[str]:
        """The command line of a probe. Every word is ours: transport, protocol and size are of a few known ones."""
        plan = self._plan()
        words = ["--transport", order.transport, "--protocol", order.protocol, "--mib", str(order.mib)]
        devices = sorted({device for spec in plan.processes if spec.is_engine for device in spec.rdma})
        words += ["--host", self._address, *(["--devices", ",".join(devices)] if devices else [])]
        return program.engine(interpreter_of(plan, "timing transfers"), "probe", *words)


def _commands(order: ExamineOrder) -> str:
    """The first key of a topology that names a command; "" if none does. What is no topology is a finding."""
    try:
        return commands_in(parse_text(order.text, order.source))
    except ConfigError:
        return ""


async def _output(argv: Sequence[str], given: bytes, within_s: float, told_on_failure: bool = False) -> bytes:
    """What a process prints. `told_on_failure`: it prints its failure as a result. Raises PdctlError."""
    async with started(argv) as process:
        try:
            async with asyncio.timeout(within_s):
                out, said = await process.communicate(given)
        except TimeoutError:
            raise PdctlError(f"{argv[2]} took more than {within_s:g} s") from None
    if process.returncode == 0 or (told_on_failure and out.strip()):
        return out
    raise PdctlError(f"{argv[2]} failed: {last_line(said, process.returncode)}")
