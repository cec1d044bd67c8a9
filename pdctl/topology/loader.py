"""Loads a Topology from TOML: reads the file, checks every key, fills in defaults, then checks the whole topology and
this machine.

All problems of the keys are reported together, each with its line. If there are none, all problems of the topology are.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import tomli

from pdctl.errors import ConfigError, PdctlError, Problem
from pdctl.host import Host
from pdctl.topology.build import build
from pdctl.topology.checks.consistency import topology_problems
from pdctl.topology.checks.host import facts_problems, fault_problems, host_problems
from pdctl.topology.checks.keys import key_problems
from pdctl.topology.document import Document
from pdctl.topology.spec import Topology
from pdctl.topology.toml_lines import key_lines
from pdctl.user_files import read_user_text


def load_file(path: Path, host: Host) -> Topology:
    """Load and check a topology file. Raises ConfigError with every problem found, PdctlError if unreadable."""
    return load_text(_read(path), str(path), host)


def load_imagined(path: Path) -> Topology:
    """Load and check a topology file without comparing it with a machine: nothing of it will be started here. Raises
    ConfigError, PdctlError."""
    return load_cluster_text(_read(path), str(path))


def load_cluster_text(text: str, source: str) -> Topology:
    """Load and check a topology that runs on other machines than this one, or not only on this one. Raises
    ConfigError."""
    document, topology = _built(text, source)
    if problems := [*topology_problems(document, topology)]:
        raise ConfigError(source, sorted(problems, key=lambda problem: problem.line))
    return topology


def load_text(text: str, source: str, host: Host) -> Topology:
    """Load and check a topology given as text; `source` names it in messages."""
    document, topology = _built(text, source)
    problems = [*topology_problems(document, topology), *host_problems(document, topology, host)]
    # A launcher checks a group only if everything that it builds on is right.
    problems = problems or [*fault_problems(document, topology, host)]
    if problems:
        raise ConfigError(source, sorted(problems, key=lambda problem: problem.line))
    return topology


def parse_text(text: str, source: str) -> Topology:
    """A topology given as text, of which only the keys are checked: the rest may be on another machine. Raises
    ConfigError."""
    return _built(text, source)[1]


def check_part(topology: Topology, part: Topology, host: Host, is_here: bool = True) -> None:
    """Compare the part of a cluster's topology that one node runs with that node, which is this machine if `is_here`.
    Raises ConfigError, with lines of the whole topology."""
    places = {group.name: index for index, group in enumerate(topology.engines)}
    groups = tuple(places[group.name] for group in part.engines)
    document = Document(tomli.loads(topology.text), key_lines(topology.text), groups)
    problems = [*(host_problems if is_here else facts_problems)(document, part, host)]
    problems = problems or [*fault_problems(document, part, host)]
    if problems:
        raise ConfigError(topology.source or "the topology", sorted(problems, key=lambda problem: problem.line))


def _read(path: Path) -> str:
    try:
        return read_user_text(path)
    except FileNotFoundError:
        raise PdctlError(f"topology file {path} does not exist", "create one with: pdctl init") from None
    except (OSError, UnicodeDecodeError) as failure:
        raise PdctlError(f"topology file {path} cannot be read: {failure}") from failure


def _built(text: str, source: str) -> tuple[Document, Topology]:
    """A topology whose keys are valid. Raises ConfigError."""
    try:
        document = Document(tomli.loads(text), key_lines(text))
    except tomli.TOMLDecodeError as failure:
        raise ConfigError(source, [_syntax_problem(failure, text)]) from None
    if problems := [*key_problems(document)]:
        raise ConfigError(source, sorted(problems, key=lambda problem: problem.line))
    # Further checks need valid values.
    return document, replace(build(document.data, source), text=text)


def _syntax_problem(failure: tomli.TOMLDecodeError, text: str) -> Problem:
    found = re.search(r"at line (\d+)", str(failure))
    line = int(found[1]) if found else text.count("\n") + 1
    return Problem(line, "", f"not TOML: {failure}")


def port_problems(topology: Topology, host: Host) -> list[Problem]:
    """A problem if another process listens on the proxy's port. Not called for a service that is already up."""
    holder = host.listening.get(topology.proxy.port)
    if holder is None:
        return []
    # The text as it was read: the file may have changed, and the built-in topology has none.
    line = key_lines(topology.text).get(("proxy", "port"), 0)
    message = f"port {topology.proxy.port} is in use by {holder.describe()}"
    hint = "stop that process or choose another port under [proxy]"
    if "pdctl.proxy" in holder.command:
        hint = "another pdctl service uses it: stop it with pdctl down -s NAME, or choose another port under [proxy]"
    return [Problem(line, "proxy.port", message, hint)]
