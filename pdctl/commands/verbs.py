"""The verbs by name. A verb's module is imported when it runs or shows its own help: `pdctl --help` stays fast."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any, NamedTuple, cast

import typer
from typer.core import TyperCommand, TyperGroup


class Verb(NamedTuple):
    """Where a verb is: a module in pdctl.commands with a function of its name, or with `app`, a group of verbs. `help`:
    the first sentence of its help."""

    module: str
    help: str


VERBS = {
    "init": Verb("setup.init", "Write a commented topology for this machine: its GPUs, else its CPUs."),
    "plan": Verb("setup.plan", "Show the processes of a topology with roles, devices, CPU pins and ports."),
    "up": Verb("control.up", "Start the service, or take over the processes of a killed supervisor."),
    "status": Verb(
        "inspect.status",
        "Show the service's processes (state, restarts and their causes, resource use, load) and the KV transfers.",
    ),
    "top": Verb(
        "inspect.top", "Show the service on the full screen: topology, engines, load, latencies, KV links and events."
    ),
    "dash": Verb(
        "inspect.dash",
        "Open the live page and print its link: engines, links, latency, load, events, requests, exits, findings.",
    ),
    "logs": Verb("inspect.logs", "Show the logs of one process, or of all processes merged by time."),
    "events": Verb(
        "inspect.events",
        "Print the service's events as JSON lines: starts, readiness, exits, drains, restarts, applies.",
    ),
    "why": Verb(
        "inspect.why",
        "Show how and why a process exited: signal or exit code, cause, memory use, last log lines, kernel messages.",
    ),
    "restart": Verb("control.process", "Stop a process and start it again."),
    "stop": Verb("control.process", "Stop a process and keep it stopped."),
    "start": Verb("control.process", "Start a stopped or failed process, or put a drained engine back into service."),
    "drain": Verb("control.process", "Stop sending requests to an engine and wait until it is idle."),
    "role": Verb("control.role", "Give an engine another role."),
    "scale": Verb("control.apply", "Change the number of replicas of an engine group."),
    "apply": Verb("control.apply", "Apply the edited topology to the running service."),
    "upgrade": Verb(
        "control.upgrade",
        "Have this version of pdctl take over the running service: the supervisor, then every process that changes.",
    ),
    "kv": Verb("inspect.kv", "Show the KV blocks of each engine and the leases on them."),
    "ask": Verb("ask", "Complete a text through the proxy and print the answer as it arrives."),
    "agent": Verb("cluster.agent", "Run this machine's part of a service that runs on several."),
    "cluster": Verb("cluster.certificates", "Make the certificates of a cluster's nodes, and let machines join it."),
    "doctor": Verb("doctor", "Check this machine."),
    "key": Verb("setup.key", "Create an API key."),
    "down": Verb("control.down", "Stop the service: the proxy first, then the engines."),
    "simulate": Verb("predict.simulate", "Predict what a service would measure under a load."),
    "recommend": Verb(
        "predict.recommend",
        "Find the roles, counts, chunk size and policy that keep the targets for most requests of a load, or say that "
        "prefill and decode should not be separated.",
    ),
    "bench": Verb("bench", "Measure a service under load and compare results."),
    "metrics": Verb("inspect.metrics", "Dashboards and alerts for a service's metrics."),
    "version": Verb("setup.version", "Show the versions of pdctl, its Python and the engines' environments."),
    "completion": Verb("shell.completion", "Print a shell's completion script, or install it."),
    "manual": Verb("shell.manual", "Print the man page."),
}


class _Commands(MutableMapping[str, Any]):
    """Commands by verb: each is made when it is looked up first."""

    def __init__(self, made: dict[str, Any]) -> None:
        self._made = made
        self._names = dict.fromkeys((*VERBS, *made))

    def __getitem__(self, name: str) -> Any:
        if name not in self._made and name in VERBS:
            self._made[name] = _load(name)
        return self._made[name]

    def __setitem__(self, name: str, command: object) -> None:
        self._names[name] = None
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        self._made.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _load(name: str) -> TyperCommand | TyperGroup:
    from typer.main import get_command

    module = import_module(f"pdctl.commands.{VERBS[name].module}")
    app = getattr(module, "app", None)
    if not isinstance(app, typer.Typer):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        app.command(name)(getattr(module, name))
    command = get_command(app)
    command.name = name
    return cast(TyperCommand | TyperGroup, command)


class Verbs(TyperGroup):
    """The root of the command line."""

    def __init__(self, *, commands: dict[str, Any] | None = None, **attributes: Any) -> None:
        super().__init__(commands=cast(Any, _Commands(dict(commands or {}))), **attributes)

    def list_commands(self, _: typer.Context) -> list[str]:  # type: ignore[override]  # typer has its own copy of click
        """Names of the verbs, in the order of the help."""
        return list(self.commands)

    def format_commands(self, context: Any, formatter: Any) -> None:
        """Write the list of verbs with whole sentences, without importing their modules."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])
